"""Requests and responses of the HTTP contract. Every string and list has a bound."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

from recsys.ladder import Source

# As in the lake, which takes nothing older.
_EARLIEST = datetime(1990, 1, 1, tzinfo=UTC)
_LATEST = datetime(2200, 1, 1, tzinfo=UTC)
_MAX_EXTRA = 16


def _check_moment(moment: datetime) -> datetime:
    if not _EARLIEST <= moment < _LATEST:
        raise ValueError("must lie between the years 1990 and 2200")
    return moment


def _check_timezone(name: str) -> str:
    if not _is_timezone(name):
        raise ValueError("must be an IANA time zone, such as Europe/Berlin")
    return name


@lru_cache(maxsize=1024)
def _is_timezone(name: str) -> bool:
    # Arrow's own word counts: it is Arrow that will compute the hour.
    try:
        pc.hour(pa.scalar(0, pa.timestamp("us", tz=name)))
    except pa.ArrowInvalid:
        return False
    return True


def _check_extra(value: Any) -> Any:
    if value is None or (isinstance(value, str) and len(value) <= 128):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    raise ValueError("must be a number, true, false, null or a text of at most 128 characters")


def _as_text(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _reject_boolean(value: Any) -> Any:
    # JSON's true is 1 to Python.
    if isinstance(value, bool):
        raise ValueError("must not be true or false")
    return value


# The lake trims text as well, so that " a" is no other event than "a".
Text = Annotated[
    str, StringConstraints(strict=True, strip_whitespace=True, min_length=1, max_length=128)
]
Id = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | Text
Flag = Annotated[bool, Field(strict=True)]
Moment = Annotated[
    AwareDatetime,
    BeforeValidator(_reject_boolean),
    AfterValidator(_check_moment),
    WithJsonSchema(
        {
            "anyOf": [{"type": "string"}, {"type": "number"}],
            "description": "ISO 8601 with its offset from UTC, or seconds since 1970.",
            "examples": ["2026-01-05T10:00:00Z"],
        }
    ),
]
Timezone = Annotated[Text, AfterValidator(_check_timezone)]
Price = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Items = Annotated[list[Id], Field(max_length=1000)]
Categories = Annotated[list[Text], Field(max_length=100)]
TopK = Annotated[int, Field(strict=True, ge=1, le=100)]


class Body(BaseModel):
    """Base of every request: a misspelt field is an error, not silence."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Answer(BaseModel):
    """Base of every response."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class RecentEvent(Body):
    """One event of a history that comes with the request."""

    item_id: Id
    event_type: Text | None = None
    timestamp: Moment | None = None
    device: Text | None = None


class Context(BaseModel):
    """What the shop knows now. Fields of its own (`ingest.context`) are welcome; a model that was
    not trained with one ignores it.
    """

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)
    __pydantic_extra__: dict[str, Annotated[Any, AfterValidator(_check_extra)]]

    timestamp: Moment | None = None
    """Now, unless given."""
    timezone: Timezone | None = None
    device: Text | None = None
    segment: Text | None = None

    @property
    def own(self) -> dict[str, str]:
        """The fields of the shop's own as text, as the lake has them."""
        found = (self.__pydantic_extra__ or {}).items()
        return {name: _as_text(value) for name, value in found if value is not None}

    @model_validator(mode="before")
    @classmethod
    def _bound_extra(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and len(value) > _MAX_EXTRA:
            raise ValueError(f"must have at most {_MAX_EXTRA} fields")
        return value


class Filter(Body):
    """What the list may hold."""

    exclude_seen: Flag = True
    """Leave out every item of the history."""
    exclude_items: Items = []
    include_categories: Categories = []
    """Only these; empty for all."""
    exclude_categories: Categories = []
    available_only: Flag = False
    min_price: Price | None = None
    max_price: Price | None = None

    @model_validator(mode="after")
    def _has_a_range(self) -> "Filter":
        if (
            self.min_price is not None
            and self.max_price is not None
            and self.min_price > self.max_price
        ):
            raise ValueError("min_price must not exceed max_price")
        return self


class RecommendRequest(Body):
    """One list for one visitor, who is named in exactly one way."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "user_history": ["a-17", "a-42"],
                    "top_k": 5,
                    "context": {"device": "mobile", "timezone": "Europe/Berlin"},
                    "filter": {"available_only": True},
                }
            ]
        }
    )

    user_id: Id | None = None
    session_id: Id | None = None
    user_history: Items | None = None
    """Item ids, oldest first."""
    recent_events: Annotated[list[RecentEvent], Field(max_length=1000)] | None = None
    """Oldest first."""
    top_k: TopK = 10
    context: Context = Field(default_factory=lambda: Context.model_validate({}))
    filter: Filter = Filter()
    explain: Flag = False
    """Say why each item is in the list."""
    timeout_ms: Annotated[int, Field(strict=True, ge=1, le=10_000)] | None = None

    @model_validator(mode="after")
    def _names_one_visitor(self) -> "RecommendRequest":
        ways = ("user_id", "session_id", "user_history", "recent_events")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(ways)}; got {' and '.join(given) or 'none'}"
            )
        return self


class SimilarRequest(Body):
    """One list of items like a given one."""

    item_id: Id
    top_k: TopK = 10
    filter: Filter = Filter()
    explain: Flag = False
    timeout_ms: Annotated[int, Field(strict=True, ge=1, le=10_000)] | None = None


def _reference(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


class BatchRequest(Body):
    """Several requests; each is validated and answered on its own."""

    requests: Annotated[
        list[Annotated[dict[str, Any], WithJsonSchema(_reference(RecommendRequest))]],
        Field(min_length=1, max_length=100),
    ]


class EventIn(Body):
    """Something that a visitor did."""

    event_id: Text
    """The shop's own; the same id twice counts once."""
    user_id: Id | None = None
    session_id: Id | None = None
    item_id: Id
    event_type: Text = "view"
    timestamp: Moment
    device: Text | None = None
    price: Price | None = None
    quantity: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] | None = None

    @model_validator(mode="after")
    def _has_an_owner(self) -> "EventIn":
        if self.user_id is None and self.session_id is None:
            raise ValueError("give user_id, session_id or both")
        return self


class EventsRequest(Body):
    """Events; each is validated on its own."""

    events: Annotated[
        list[Annotated[dict[str, Any], WithJsonSchema(EventIn.model_json_schema())]],
        Field(min_length=1, max_length=1000),
    ]


class Reason(Answer):
    """Why an item is in a list."""

    source: Source
    """The rung of the ladder that the item came from."""
    because: int | str | None = None
    """The item of the history that is most often followed by this one; none for what is popular."""
    text: str
    """For people, in English."""


class Recommendation(Answer):
    """One item of a list."""

    item_id: int | str
    score: float
    """Comparable within one list of one source only."""
    rank: int
    """From 1."""
    reason: Reason | None = None
    """With `explain`."""


class RecommendResponse(Answer):
    """A list, and how it came about."""

    recommendations: list[Recommendation]
    recommendation_id: str
    model_version: str
    source: Source
    """Where the list (its first item, if rungs were joined) came from."""
    degraded: bool
    """The model should have answered, and could not."""
    num_input_items: int
    unknown_items: int
    """Input items that the model's catalogue does not know."""
    took_ms: float


class FieldFault(Answer):
    """What is wrong with one field."""

    name: str
    """Path to the field; empty for the whole body."""
    message: str


class Problem(Answer):
    """An error as RFC 9457 has it."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    """Stable name for programs."""
    request_id: str
    fields: list[FieldFault] = []


class BatchEntry(Answer):
    """The answer to one request of a batch: `response` with 200, else `problem`."""

    status: int
    response: RecommendResponse | None = None
    problem: Problem | None = None


class BatchResponse(Answer):
    """Answers in the order of the requests."""

    results: list[BatchEntry]


class EventResult(Answer):
    """What became of one event."""

    event_id: str | None
    status: Literal["accepted", "duplicate", "rejected"]
    fields: list[FieldFault] = []
    """Of a rejected event."""


class EventsResponse(Answer):
    """What became of each event, in the order given; what is accepted is on disk."""

    accepted: int
    duplicates: int
    rejected: int
    results: list[EventResult]


class HistoryEvent(Answer):
    """One event that is known of a user."""

    item_id: int | str
    event_type: str | None
    timestamp: datetime | None
    device: str | None


class HistoryResponse(Answer):
    """The latest events of a user, oldest first."""

    user_id: str
    events: list[HistoryEvent]


class ErasedResponse(Answer):
    """What was erased."""

    user_id: str
    erased_events: int


class HealthResponse(Answer):
    """The state of this process and of the ranker behind it."""

    status: Literal["ok", "degraded", "starting"]
    model_version: str
    """The champion."""
    shares: dict[str, float]
    """Of the visitors, by version."""
    vocab_size: int
    device: str | None
    """Of the ranker; unknown until it has answered once."""
    ranker: Literal["closed", "open", "half-open"]
    """Circuit breaker: closed is healthy."""

"""Sections of what visitors are answered by, and of the jobs that compare such answers."""

import re
from typing import Any, Literal, Self

from pydantic import (
    AwareDatetime,
    Field,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from ray_jobs.sections.base import Section


class ServeConfig(Section):
    """Where the endpoint listens and what it may cost."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    http: Literal["haproxy", "proxy"] = "haproxy"
    """What brings requests to the endpoint: Ray's HAProxy, or its proxy in Python, several times
    slower. It counts where a job starts a Ray of its own, as the demo does; a Ray that runs already
    was started with one or the other, see `cluster/serve.env`."""
    deadline_ms: int = Field(70, ge=1)
    """A request that the model has not answered by then is answered by the next rung."""
    redis_url: str | None = None
    """Of the Redis that holds histories; "$NAME" of an environment variable keeps a password out of
    files and dashboards, and must then be set where the endpoint runs."""
    feast_repo: str | None = None
    """Folder of a Feast repository, e.g. cluster/feast."""
    history: Literal["sqlite", "redis", "feast"] = "sqlite"
    """Where histories are: in a file of one machine, or in a store that several share."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Any other field of `serve_app.settings`, such as ingress_replicas, max_rankers, shared_cache;
    what this section says by itself is not among them."""

    @field_serializer("redis_url", when_used="json")
    def _without_password(self, url: str | None) -> str | None:
        return None if url is None else re.sub("//.*@", "//***@", url)

    @field_validator("history")
    @classmethod
    def _has_its_address(cls, history: str, info: ValidationInfo) -> str:
        needed = {"redis": "redis_url", "feast": "feast_repo"}.get(history)
        if needed is not None and info.data.get(needed, "") is None:
            raise ValueError(f"{history} needs serve.{needed}")
        return history


class ExperimentConfig(Section):
    """Which versions are compared, and what counts as a success of a list."""

    name: str | None = Field(None, pattern=r"^\w[\w.-]*$")
    """Folder of the report below `<root>/experiments`; the names of both versions by default."""
    control: str | None = None
    """A version of the registry; by default the champion of the last state that had a canary."""
    treatment: str | None = None
    """By default the canary beside it."""
    treatment_share: float | None = Field(None, gt=0, lt=1)
    """Of the visitors of both; by default what the registry gave it."""
    start: AwareDatetime | None = None
    """Lists from then on count; by default from the first one of the treatment on. A later change
    of the shares moves visitors between the arms: begin after it."""
    end: AwareDatetime | None = None
    """Fixed before the first look, or the intervals say too much; now by default."""
    window_hours: float = Field(24, gt=0)
    """For so long after a list an event on one of its items counts for it."""
    primary: Literal["click_through", "conversion", "bought_lists"] = "click_through"
    """The metric that decides; the others explain."""
    clicks: tuple[str, ...] = Field(("click", "view"), min_length=1)
    """Types of events that are a click-through."""
    purchases: tuple[str, ...] = Field(("purchase",), min_length=1)
    before_days: float = Field(14, ge=0)
    """Days before the start whose events tell how active a user was, which takes some noise out of
    every metric; 0 leaves it in."""
    wanted_uplift: float = Field(0.02, gt=0)
    """Relative; the report says how many days it takes to find it."""

    @model_validator(mode="after")
    def _has_a_period(self) -> Self:
        if self.start is not None and self.end is not None and self.start >= self.end:
            raise ValueError(f"start {self.start} is not before end {self.end}")
        return self

    @model_validator(mode="after")
    def _compares_two(self) -> Self:
        if (self.control is None) != (self.treatment is None):
            raise ValueError("give control and treatment, or neither of them")
        if self.control is not None and self.control == self.treatment:
            raise ValueError(f"{self.control} cannot be compared with itself")
        return self


class RecommendConfig(Section):
    """Which lists are made for whom, and on what."""

    version: str | None = None
    """Of the registry; the champion by default."""
    top_k: int = Field(10, ge=1, le=1000)
    """Items of a list."""
    users: Literal["all", "sequences"] = "all"
    """all: whoever is in events, users or sequences; who has no sequence gets what is popular."""
    filter_seen: bool = True
    """Whether the items of the history are left out, as in serving."""
    batch_size: int = Field(512, ge=1, le=512)
    """Users that are ranked at once."""
    variant: Literal["fp32", "bf16", "int8"] = "fp32"
    """Numbers that the encoder counts in. fp32 and bf16 give the lists of an endpoint that serves
    the same; int8, for CPUs, rounds by what is encoded together, so that items which score alike
    may change places. bf16 and int8 must have passed `ray_jobs.export` before the publication."""
    num_actors: int = Field(2, ge=1)
    """Models in memory at most; as many as there is room for work."""
    cpus_per_actor: float = Field(1, gt=0)
    gpus_per_actor: float = Field(0, ge=0)
    """A part of one lets several share it."""

    @model_validator(mode="after")
    def _int8_is_for_cpus(self) -> Self:
        if self.variant == "int8" and self.gpus_per_actor:
            raise ValueError("variant int8 is for CPUs; set gpus_per_actor to 0, or take bf16")
        return self


class CanaryConfig(Section):
    """When a canary is promoted or rolled back by itself; see `ray_jobs.canary`."""

    start: AwareDatetime | None = None
    """Lists from then on count; some minutes after the first look at a canary by default."""
    settle_minutes: float = Field(10, ge=0)
    """So long after the first look every process has loaded the canary."""
    max_days: float = Field(6, gt=0)
    """After so many the decision is taken by `at_end`; fewer than lie between two retrainings, or a
    canary meets the next one."""
    at_end: Literal["better", "promote", "roll back"] = "better"
    """better: promoted if the primary metric is over the bar, however little, else rolled back."""
    primary: Literal["click_through", "conversion"] = "click_through"
    """The metric that promotes; both roll back."""
    least_uplift: float = Field(0.0, gt=-1)
    """The bar, relative to the champion: a canary is promoted when the interval of its primary
    metric lies above, and rolled back when it lies below; e.g. -0.01 allows a loss of one
    hundredth."""
    wanted_uplift: float = Field(0.2, gt=0)
    """Relative; uplifts of about this size are found soonest. Too much of it costs little, too
    little of it much: below what the traffic can show in `max_days` nothing is decided earlier."""
    error_rate: float = Field(0.05, gt=0, lt=1)
    """How often at most any of the intervals misses the truth at any look; no wrong decision comes
    without that before `max_days`."""
    max_degraded: float = Field(0.02, gt=0, lt=1)
    """Share of lists from a lower rung above the champion's that a canary is rolled back for."""
    window_hours: float = Field(6, gt=0)
    """For so long after a list an event on one of its items counts for it; until then nothing is
    known of the list but who gave it."""

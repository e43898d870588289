"""The HTTP endpoints, as a plain FastAPI app over a `Recommender`; it knows nothing of Ray."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from pydantic import ValidationError
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException

from recsys.filters import FilterError
from serve_app.bodies import JsonRoute
from serve_app.event_log import LoggedEvent
from serve_app.intake import Intake
from serve_app.keys import KeyCheck
from serve_app.middleware import Gate
from serve_app.problems import (
    MEDIA_TYPE,
    install_handlers,
    invalid_request,
    request_id_of,
    unsupported_filter,
    validation_faults,
)
from serve_app.recommender import Recommender
from serve_app.schemas import (
    BatchEntry,
    BatchRequest,
    BatchResponse,
    ErasedResponse,
    EventIn,
    EventResult,
    EventsRequest,
    EventsResponse,
    FieldFault,
    HealthResponse,
    HistoryEvent,
    HistoryResponse,
    Problem,
    RecommendRequest,
    RecommendResponse,
    SimilarRequest,
)
from serve_app.settings import Settings

_AHEAD_S = 24 * 3600.0
_PROBLEM = {"$ref": f"#/components/schemas/{Problem.__name__}"}


def _problems(texts: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"content": {MEDIA_TYPE: {"schema": _PROBLEM}}, "description": text}
        for status, text in texts.items()
    }


_ALWAYS = _problems(
    {
        429: "Too many requests at once; see Retry-After.",
        431: "The headers are too large.",
    }
)
_WITH_KEY = _problems(
    {
        401: "No key, or one that is not known.",
        403: "The key lacks the scope.",
        422: "A field does not fit; `fields` says which.",
    }
)
_WITH_BODY = _problems(
    {
        400: "The body is not JSON in UTF-8, or has a name twice.",
        408: "The body took too long to come.",
        413: "The body is too large.",
        415: "The body is not sent as application/json.",
    }
)
_WITH_STORE = _problems({503: "Not now; see Retry-After."})
API_VERSION = "1"


class _TextConvertor(PathConvertor):
    """Text of any kind: slashes as in `path`, and line breaks too."""

    regex = r"[\s\S]*"


UserId = Annotated[str, Path(min_length=1, max_length=128)]


def create_app(
    recommender: Recommender,
    intake: Intake,
    settings: Settings,
    *,
    echo_request_id: bool = True,
    now: Callable[[], float] = time.time,
) -> FastAPI:
    """The whole HTTP contract; closing the app closes the intake, and the history with it.

    Args:
        echo_request_id: False where the server sends X-Request-ID back by itself.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        intake.start()
        yield
        await recommender.close()
        await intake.close()

    app = FastAPI(
        title="nextitem",
        summary="Next-item recommendations for a shop",
        version=API_VERSION,
        lifespan=lifespan,
        responses=_ALWAYS,
    )
    install_handlers(app)
    app.add_middleware(
        Gate,
        settings=settings,
        metrics=recommender.metrics,
        echo_request_id=echo_request_id,
    )
    app.include_router(_recommend_routes(recommender, settings))
    app.include_router(_event_routes(recommender, intake, settings, now))
    app.include_router(_health_routes(recommender))
    return app


def _recommend_routes(recommender: Recommender, settings: Settings) -> APIRouter:
    routes = APIRouter(
        tags=["recommend"],
        dependencies=[Depends(KeyCheck(settings.api_keys, "read"))],
        route_class=JsonRoute,
        responses=_WITH_KEY | _WITH_BODY,
    )

    @routes.post("/v1/recommend", response_model_exclude_none=True)
    @routes.post("/recommend", response_model_exclude_none=True, include_in_schema=False)
    async def recommend(request: RecommendRequest, http: Request) -> RecommendResponse:
        """What this visitor will want next. Never empty while enough items pass the filter."""
        response = await recommender.recommend(request)
        http.scope["source"] = response.source
        return response

    @routes.post("/v1/recommend:batch", response_model_exclude_none=True)
    async def recommend_batch(batch: BatchRequest, http: Request) -> BatchResponse:
        """Up to a hundred requests, each with a status of its own."""
        request_id = request_id_of(http)
        entries = (_recommend_one(recommender, entry, request_id) for entry in batch.requests)
        return BatchResponse(results=list(await asyncio.gather(*entries)))

    @routes.post("/v1/similar", response_model_exclude_none=True)
    async def similar(request: SimilarRequest, http: Request) -> RecommendResponse:
        """Items like a given one."""
        response = await recommender.similar(request)
        http.scope["source"] = response.source
        return response

    return routes


async def _recommend_one(
    recommender: Recommender, entry: dict[str, Any], request_id: str
) -> BatchEntry:
    try:
        request = RecommendRequest.model_validate(entry)
        return BatchEntry(status=200, response=await recommender.recommend(request))
    except ValidationError as error:
        problem = invalid_request(validation_faults(error), request_id)
    except FilterError as error:
        problem = unsupported_filter(error, request_id)
    return BatchEntry(status=problem.status, problem=problem)


def _event_routes(
    recommender: Recommender, intake: Intake, settings: Settings, now: Callable[[], float]
) -> APIRouter:
    register_url_convertor("text", _TextConvertor())
    routes = APIRouter(tags=["events"], route_class=JsonRoute, responses=_WITH_KEY | _WITH_STORE)
    read, write, admin = (
        [Depends(KeyCheck(settings.api_keys, scope))] for scope in ("read", "write", "admin")
    )

    @routes.post("/v1/events", status_code=202, dependencies=write, responses=_WITH_BODY)
    async def post_events(request: EventsRequest) -> EventsResponse:
        """Up to a thousand events. What is accepted is on disk and counts from the next request."""
        checked = [_check_event(event, now()) for event in request.events]
        valid = [event for event in checked if isinstance(event, LoggedEvent)]
        is_new = iter(await intake.accept(valid))
        results = [
            event
            if isinstance(event, EventResult)
            else EventResult(
                event_id=event.event_id, status="accepted" if next(is_new) else "duplicate"
            )
            for event in checked
        ]
        for result in results:
            recommender.metrics.events.labels(result.status).inc()
        statuses = [result.status for result in results]
        return EventsResponse(
            accepted=statuses.count("accepted"),
            duplicates=statuses.count("duplicate"),
            rejected=statuses.count("rejected"),
            results=results,
        )

    @routes.get("/v1/users/{user_id:text}/history", dependencies=read)
    async def get_history(
        user_id: UserId, limit: Annotated[int, Query(ge=1, le=1000)] = 50
    ) -> HistoryResponse:
        """The latest events of a user, oldest first; none for a user that nobody knows."""
        events = await recommender.history.recent("user_id", user_id, limit)
        return HistoryResponse(
            user_id=user_id,
            events=[
                HistoryEvent(
                    item_id=event.item_id,
                    event_type=event.event_type,
                    timestamp=_moment(event.timestamp_us),
                    device=event.device,
                )
                for event in events
            ],
        )

    @routes.delete("/v1/users/{user_id:text}/history", dependencies=admin)
    async def erase_history(user_id: UserId) -> ErasedResponse:
        """Forgets all events of a user."""
        erased = await intake.erase(user_id)
        return ErasedResponse(user_id=user_id, erased_events=erased)

    return routes


def _health_routes(recommender: Recommender) -> APIRouter:
    routes = APIRouter(tags=["operations"])

    @routes.get("/health/live")
    async def live() -> dict[str, str]:
        """This process runs."""
        return {"status": "ok"}

    @routes.get("/health/ready", responses=_problems({503: "Not warm yet."}))
    async def ready() -> dict[str, str]:
        """The ranker has been warm once; from then on this process can always answer."""
        if not await recommender.is_ready():
            raise HTTPException(503, "The ranker is not warm yet.", {"Retry-After": "1"})
        return {"status": "ok"}

    @routes.get("/health")
    async def health() -> HealthResponse:
        """What serves, and how it is."""
        info, breaker = recommender.ranker_info, recommender.ranker.breaker.state
        serving, champion = recommender.models.serving, recommender.models.champion
        is_well = info is not None and breaker == "closed"
        return HealthResponse(
            status="ok" if is_well else "starting" if info is None else "degraded",
            model_version=champion.version,
            shares={version: serving.share_of(version) for version in serving.versions},
            vocab_size=champion.artifact.catalogue.num_items,
            device=info.device if info else None,
            ranker=breaker,
        )

    @routes.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(
            recommender.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    return routes


def _check_event(event: dict[str, Any], now_s: float) -> LoggedEvent | EventResult:
    try:
        valid = EventIn.model_validate(event)
        faults = []
        if valid.timestamp.timestamp() > now_s + _AHEAD_S:
            faults = [FieldFault(name="timestamp", message="lies more than a day ahead")]
    except ValidationError as error:
        faults = validation_faults(error)
    if faults:
        event_id = event.get("event_id")
        is_text = isinstance(event_id, str) and len(event_id) <= 128 and event_id.isprintable()
        named = event_id if is_text else None
        return EventResult(event_id=named, status="rejected", fields=faults)
    return LoggedEvent(
        event_id=valid.event_id,
        user_id=None if valid.user_id is None else str(valid.user_id),
        session_id=None if valid.session_id is None else str(valid.session_id),
        item_id=valid.item_id,
        event_type=valid.event_type,
        timestamp_us=round(valid.timestamp.timestamp() * 1e6),
        device=valid.device,
        price=valid.price,
        quantity=valid.quantity,
        received_us=round(now_s * 1e6),
    )


def _moment(timestamp_us: int | None) -> datetime | None:
    return None if timestamp_us is None else datetime.fromtimestamp(timestamp_us / 1e6, UTC)

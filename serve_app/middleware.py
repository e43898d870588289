"""What happens around every request: its id, the bounds on its headers and body, shedding, and its
latency.
"""

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.metrics import Metrics
from serve_app.problems import make_problem, problem_response
from serve_app.settings import Settings

log = logging.getLogger(__name__)

_FAILED = "The service failed; its log has the details under this request_id."
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_NEVER_SHED = ("/health", "/metrics")
_MAX_HEADER_BYTES = 32_768
_TOO_MANY_HEADERS = f"The headers are larger than {_MAX_HEADER_BYTES} bytes; send less."


class Gate:
    """ASGI middleware; it stands outside of everything else.

    Args:
        echo_request_id: False where the server itself sends the id back, as Ray Serve does.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, metrics: Metrics, *, echo_request_id: bool = True
    ) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._echo_request_id = echo_request_id
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        scope["request_id"] = _request_id(Headers(scope=scope).get("X-Request-ID"))
        status, has_started = 500, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, has_started
            if message["type"] == "http.response.start":
                status, has_started = message["status"], True
                if self._echo_request_id:
                    MutableHeaders(scope=message)["X-Request-ID"] = scope["request_id"]
            await send(message)

        self._count(1)
        try:
            await self._pass(scope, receive, send_with_id)
        except Exception as error:
            if has_started:
                raise
            log.error("Request %s failed.", scope["request_id"], exc_info=error)
            problem = make_problem(500, _FAILED, scope["request_id"], code="internal_error")
            await problem_response(problem)(scope, receive, send_with_id)
        finally:
            self._count(-1)
            route = getattr(scope.get("route"), "path", "unknown")
            source = scope.get("source", "none")
            self._metrics.request_seconds.labels(route, source, str(status)).observe(
                time.monotonic() - started
            )

    def _count(self, step: int) -> None:
        self._in_flight += step
        self._metrics.in_flight.set(self._in_flight)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._settings.max_body_bytes
        if self._in_flight > self._settings.max_in_flight and not scope["path"].startswith(
            _NEVER_SHED
        ):
            self._metrics.shed.inc()
            problem = make_problem(429, "The service is busy; try again.", scope["request_id"])
            response = problem_response(problem, {"Retry-After": "1"})
            await response(scope, receive, send)
            return
        if sum(len(name) + len(value) for name, value in scope["headers"]) > _MAX_HEADER_BYTES:
            problem = make_problem(431, _TOO_MANY_HEADERS, scope["request_id"])
            await problem_response(problem, {"Connection": "close"})(scope, receive, send)
            return
        declared = Headers(scope=scope).get("Content-Length", "0")
        if declared.isdecimal() and int(declared[:20]) > limit:
            problem = make_problem(413, _too_large(limit), scope["request_id"])
            await problem_response(problem, {"Connection": "close"})(scope, receive, send)
            return
        await self._app(scope, _bounded(receive, limit, self._settings.body_timeout_s), send)


def _bounded(receive: Receive, limit: int, timeout_s: float) -> Receive:
    """`receive` for bodies that do not say how long they are, or never come to their end."""
    received, is_complete = 0, False
    end = asyncio.get_running_loop().time() + timeout_s

    async def receive_bounded() -> Message:
        nonlocal received, is_complete
        try:
            # What comes after the body is the end of the connection; it may take its time.
            async with asyncio.timeout_at(None if is_complete else end):
                message = await receive()
        except TimeoutError:
            detail = f"The body did not come within {timeout_s:g} s; send it at once."
            raise HTTPException(408, detail, {"Connection": "close"}) from None
        is_complete = not message.get("more_body", False)
        received += len(message.get("body", b""))
        if received > limit:
            raise HTTPException(413, _too_large(limit), {"Connection": "close"})
        return message

    return receive_bounded


def _too_large(limit: int) -> str:
    return f"The body is larger than {limit} bytes; send less at once."


def _request_id(given: str | None) -> str:
    return given if given and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

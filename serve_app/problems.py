"""Errors as `application/problem+json` (RFC 9457): a stable code, the request's id and the fields
at fault.
"""

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from recsys.filters import FilterError
from serve_app.errors import EventsUnavailableError, HistoryUnavailableError
from serve_app.schemas import FieldFault, Problem

log = logging.getLogger(__name__)

_UNAVAILABLE = "What the request needs cannot be written or read now; send it again."
MEDIA_TYPE = "application/problem+json"
_CODES = {
    400: "malformed_body",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_too_slow",
    413: "body_too_large",
    415: "unsupported_media_type",
    422: "invalid_request",
    429: "too_many_requests",
    431: "headers_too_large",
    503: "not_ready",
}


def make_problem(
    status: int, detail: str, request_id: str, *, code: str = "", fields: Sequence[FieldFault] = ()
) -> Problem:
    """A problem with the usual code and title of its status."""
    return Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code or _CODES.get(status, "error"),
        request_id=request_id,
        fields=list(fields),
    )


def problem_response(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(
        problem.model_dump(mode="json"), problem.status, headers, media_type=MEDIA_TYPE
    )


def invalid_request(faults: Sequence[FieldFault], request_id: str) -> Problem:
    """The problem of a request whose fields do not fit."""
    names = ", ".join(fault.name or "the body" for fault in faults[:5])
    return make_problem(422, f"The request is not valid: see {names}.", request_id, fields=faults)


def unsupported_filter(error: FilterError, request_id: str) -> Problem:
    fault = FieldFault(name="filter", message=str(error))
    return make_problem(422, str(error), request_id, code="unsupported_filter", fields=[fault])


def field_faults(errors: Sequence[Any]) -> list[FieldFault]:
    """At most twenty faults of pydantic, without the input: it may be huge or no JSON at all."""
    return [
        FieldFault(
            name=printable(_path(fault["loc"])),
            message=printable(fault["msg"].removeprefix("Value error, ")),
        )
        for fault in errors[:20]
    ]


def printable(text: str) -> str:
    """At most 200 characters of what a client sent, surrogates and control characters escaped."""
    shown = text if text.isprintable() else repr(text)[1:-1]
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def validation_faults(error: ValidationError) -> list[FieldFault]:
    return field_faults(error.errors(include_input=False, include_url=False, include_context=False))


def install_handlers(app: FastAPI) -> None:
    """Every error that the app raises on purpose leaves as a problem."""
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(FilterError, _on_filter)
    for error in (EventsUnavailableError, HistoryUnavailableError):
        app.add_exception_handler(error, _on_unavailable)


def request_id_of(request: Request) -> str:
    request_id: str = request.scope.get("request_id", "")
    return request_id


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = field_faults(error.errors())
    return problem_response(invalid_request(faults, request_id_of(request)))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = make_problem(error.status_code, str(error.detail), request_id_of(request))
    return problem_response(problem, error.headers)


async def _on_unavailable(request: Request, error: Exception) -> Response:
    # What the error says is for the operator.
    log.warning("Request %s: %s", request_id_of(request), error)
    problem = make_problem(503, _UNAVAILABLE, request_id_of(request), code="unavailable")
    return problem_response(problem, {"Retry-After": "1"})


async def _on_filter(request: Request, error: Exception) -> Response:
    assert isinstance(error, FilterError)
    return problem_response(unsupported_filter(error, request_id_of(request)))


def _path(location: Sequence[str | int]) -> str:
    # Ids are unions, whose branches pydantic adds to the path.
    parts = [str(part) for part in location if not str(part).startswith(("constrained-", "body"))]
    return ".".join(parts)

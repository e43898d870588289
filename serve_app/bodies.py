"""Bodies of requests: JSON in UTF-8, each name once in an object, and nothing else."""

import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from serve_app.problems import printable


class JsonRoute(APIRoute):
    """A route that refuses a body of another type with 415 and one that is no such JSON with 400,
    before anything of it is validated.
    """

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handle_json(request: Request) -> Response:
            strict = _JsonRequest(request.scope, request.receive)
            if await strict.body() and not _is_json(request.headers.get("Content-Type", "")):
                raise HTTPException(415, "Send the body as application/json.")
            return await handle(strict)

        return handle_json


class _JsonRequest(Request):
    async def json(self) -> Any:
        return parse_json(await self.body())


def parse_json(body: bytes) -> Any:
    """The value of a body. Raises HTTPException 400 that says why it has none."""
    try:
        return json.loads(body.decode(), object_pairs_hook=_distinct)
    except UnicodeDecodeError:
        raise HTTPException(400, "The body is not UTF-8.") from None
    except json.JSONDecodeError as error:
        raise HTTPException(400, f"The body is not JSON: {error}.") from None
    except RecursionError:
        raise HTTPException(400, "The body is nested too deeply.") from None
    except ValueError as error:
        # A name twice, or a number of thousands of digits.
        raise HTTPException(400, f"The body is not valid: {error}.") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {printable(twice)!r} comes twice in one object")
    return found


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (
        kind.startswith("application/") and kind.endswith("+json")
    )

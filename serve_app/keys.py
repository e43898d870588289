"""API keys: known by their SHA-256 alone, each with its scopes, and never logged."""

import hashlib

from fastapi import Request
from starlette.exceptions import HTTPException

from serve_app.settings import ApiKeys, Scope


class KeyCheck:
    """A FastAPI dependency: passes requests whose key has a scope, and all if there are no keys.

    A key comes as `X-API-Key` or as a bearer token.
    """

    def __init__(self, keys: ApiKeys, scope: Scope) -> None:
        self._keys = keys
        self._scope = scope

    def __call__(self, request: Request) -> None:
        """Raises HTTPException 401 for a missing or unknown key, 403 for one without the scope."""
        if not self._keys:
            return
        scopes = self._keys.get(hashlib.sha256(_key_of(request).encode()).hexdigest())
        if scopes is None:
            raise HTTPException(
                401, "Send a valid key as X-API-Key.", {"WWW-Authenticate": "Bearer"}
            )
        if self._scope not in scopes:
            raise HTTPException(403, f"This key does not have the scope {self._scope}.")


def _key_of(request: Request) -> str:
    key = request.headers.get("X-API-Key")
    if key is not None:
        return key
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else ""

"""API keys: known by their SHA-256 alone, each with its scopes, and never logged.

    python -m serve_app.keys read write

prints a new key for the client, once, and the setting that lets it in.
"""

import argparse
import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from typing import get_args

from fastapi import Request
from starlette.exceptions import HTTPException

from serve_app.settings import PREFIX, ApiKeys, Scope


class KeyCheck:
    """A FastAPI dependency: passes requests whose key has a scope, and all if there are no keys.

    A key comes as `X-API-Key` or as a bearer token.
    """

    def __init__(self, keys: ApiKeys, scope: Scope) -> None:
        self._keys = keys
        self._scope = scope

    # A coroutine, for FastAPI sends anything else through a thread.
    async def __call__(self, request: Request) -> None:
        """Raises HTTPException 401 for a missing or unknown key, 403 for one without the scope."""
        if not self._keys:
            return
        scopes = _find_scopes(self._keys, hash_key(_key_of(request)))
        if scopes is None:
            raise HTTPException(
                401, "Send a valid key as X-API-Key.", {"WWW-Authenticate": "Bearer"}
            )
        if self._scope not in scopes:
            raise HTTPException(403, f"This key does not have the scope {self._scope}.")


def hash_key(key: str) -> str:
    """What the settings know a key by."""
    return hashlib.sha256(key.encode()).hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a new key and its setting."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scopes", nargs="+", choices=get_args(Scope))
    scopes = parser.parse_args(argv).scopes
    key = secrets.token_urlsafe(32)
    print(f"For the client, shown once:  X-API-Key: {key}")
    print(f"For the service, to add:     {PREFIX}API_KEYS={json.dumps({hash_key(key): scopes})}")


def _find_scopes(keys: ApiKeys, digest: str) -> tuple[Scope, ...] | None:
    # Every key is compared in full, so that the time taken says nothing about any.
    found = None
    for known, scopes in keys.items():
        if hmac.compare_digest(known, digest):
            found = scopes
    return found


def _key_of(request: Request) -> str:
    key = request.headers.get("X-API-Key")
    if key is not None:
        return key
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else ""


if __name__ == "__main__":
    main()

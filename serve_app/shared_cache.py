"""Ranked lists in Redis, so that what one replica asked the ranker answers all of them.

A cache may be down: it is asked for a few milliseconds at most, and left alone for a while after it
failed; every failure is only a miss.
"""

import asyncio
import json
import logging
from typing import Any

import redis.asyncio as redis
from redis.exceptions import RedisError

from recsys.ranker import RankedList
from serve_app.breaker import CircuitBreaker
from serve_app.settings import Settings

log = logging.getLogger(__name__)

_FAILURES = 3
_LEFT_ALONE_S = 2.0
_MAX_WRITES = 256


class SharedCache:
    """Keys are a version and the digest of a question.

    Args:
        url: redis://, rediss:// or unix://; it may hold a password, and is never logged.
        timeout_s: for one answer of Redis, and for a connection.
    """

    def __init__(self, url: str, ttl_s: float, timeout_s: float) -> None:
        self._redis = redis.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s
        )
        self._ttl_ms = max(1, round(ttl_s * 1000))
        self._timeout_s = timeout_s
        self._breaker = CircuitBreaker(_FAILURES, _LEFT_ALONE_S)
        self._writes: set[asyncio.Task[None]] = set()

    async def get(self, key: tuple[str, bytes]) -> RankedList | None:
        """The list, if it is there and Redis says so in time."""
        if not self._breaker.allows():
            return None
        try:
            async with asyncio.timeout(self._timeout_s):
                found: Any = await self._redis.get(_name(key))
        except (RedisError, OSError, TimeoutError) as error:
            self._fail(error)
            return None
        except asyncio.CancelledError:
            # Whoever asked ran out of time, which says nothing good of Redis.
            self._breaker.record_failure()
            raise
        self._breaker.record_success()
        return None if found is None else _parse(found)

    def put_later(self, key: tuple[str, bytes], ranked: RankedList) -> None:
        """Keeps a list, without anybody waiting for it; nothing is kept while Redis is behind."""
        if len(self._writes) >= _MAX_WRITES or self._breaker.state != "closed":
            return
        task = asyncio.get_running_loop().create_task(self._put(key, ranked))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def close(self) -> None:
        """Waits for writes under way."""
        await asyncio.gather(*self._writes)
        await self._redis.aclose()

    async def _put(self, key: tuple[str, bytes], ranked: RankedList) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._redis.set(_name(key), _write(ranked), px=self._ttl_ms)
        except (RedisError, OSError, TimeoutError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        was_closed = self._breaker.state == "closed"
        self._breaker.record_failure()
        if was_closed and self._breaker.state != "closed":
            log.warning("The shared cache does not answer (%s).", type(error).__name__)


def open_shared_cache(settings: Settings) -> SharedCache | None:
    """The cache that the settings name, if any."""
    if settings.shared_cache is None or not settings.cache_size:
        return None
    url = settings.shared_cache.get_secret_value()
    return SharedCache(url, settings.cache_ttl_s, settings.shared_cache_timeout_ms / 1000)


def _name(key: tuple[str, bytes]) -> bytes:
    version, digest = key
    return b"nextitem:list:" + version.encode() + b":" + digest


def _write(ranked: RankedList) -> bytes:
    content = [ranked.item_ids, ranked.scores, ranked.model_version, ranked.unknown_items]
    return json.dumps(content, separators=(",", ":")).encode()


def _parse(content: bytes) -> RankedList | None:
    try:
        item_ids, scores, version, unknown = json.loads(content)
        return RankedList(tuple(item_ids), tuple(scores), version, unknown)
    except (ValueError, TypeError):
        log.warning("The shared cache holds something that is no list; it is left out.")
        return None

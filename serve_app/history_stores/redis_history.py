"""Histories in Redis, for several machines. Of every visitor the last events are kept, for a while.

Keys, below the prefix: `user:<id>` and `session:<id>` are sorted sets of events by time;
`sessions:<user>` names the sessions that hold events of a user, `seed:<user>` is what the lake
knew, `erased:<user>` the moment until which nothing of the user may come back. Scripts work on
several of them at a time: one server or a pair that fails over, not a Redis Cluster.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import islice
from typing import Any, ClassVar

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from recsys.queries import Event
from serve_app.errors import HistoryUnavailableError
from serve_app.event_log import LoggedEvent, LogRow, Owner
from serve_app.history_stores.store import SeedRow, join_history, pack_seed, unpack_seed

_PUSH = """
local erased = redis.call('GET', KEYS[1])
if erased and tonumber(ARGV[1]) <= tonumber(erased) then return 0 end
local time, place, id, rest = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local keep, ttl, has_user, session = tonumber(ARGV[6]), ARGV[7], ARGV[8] == '1', ARGV[9]

local function add(key)
    for _, known in ipairs(redis.call('ZRANGE', key, 0, -1)) do
        if string.sub(known, 17, 16 + #id) == id then return end
    end
    redis.call('ZADD', key, time, place .. id .. rest)
    redis.call('ZREMRANGEBYRANK', key, 0, -keep - 1)
    redis.call('EXPIRE', key, ttl)
end

if has_user then add(KEYS[2]) end
if session ~= '' then add(KEYS[3]) end
if has_user and session ~= '' then
    redis.call('SADD', KEYS[4], session)
    redis.call('EXPIRE', KEYS[4], ttl)
end
return 1
"""
"""One event into the sets of its user and session, unless it is there or the user was erased since.

A member is 16 hex digits of the position, by which Redis orders events of the same time, and a JSON
array that begins with the event_id.
"""
_ERASE = """
redis.call('SET', KEYS[1], ARGV[1])
for _, session in ipairs(redis.call('SMEMBERS', KEYS[4])) do
    local key = ARGV[3] .. session
    for _, member in ipairs(redis.call('ZRANGE', key, 0, -1)) do
        if cjson.decode(string.sub(member, 17))[5] == ARGV[2] then
            redis.call('ZREM', key, member)
        end
    end
end
local gone = redis.call('ZCARD', KEYS[2])
redis.call('DEL', KEYS[2], KEYS[3], KEYS[4])
return gone
"""
_PATIENCE_S = 2.0
"""Of pushes, erasures and the connection; loads have ten times as much."""
_MAX_CONNECTIONS = 64
_LOADED_AT_ONCE = 1000


class RedisHistory:
    """`HistoryStore` in Redis.

    Args:
        url: `redis://`, `rediss://` or `unix://`; it may hold a password and is never told.
        timeout_s: bound on a `recent`.
        keep: events that are kept of a visitor.
        ttl_s: for so long after the last event, or the last load of the seed.
    """

    needs_push: ClassVar[bool] = True

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 1.0,
        keep: int = 200,
        ttl_s: float = 90 * 86_400.0,
        prefix: str = "nextitem:",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._keep = keep
        self._ttl_s = round(ttl_s)
        self._prefix = prefix
        self._clock = clock
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=_PATIENCE_S,
            socket_timeout=_PATIENCE_S,
            socket_connect_timeout=_PATIENCE_S,
            # Whoever waits has no time for a second try, and a plan without one.
            retry=Retry(NoBackoff(), 0),
        )
        self._client = redis.asyncio.Redis.from_pool(pool)
        self._push_script = self._client.register_script(_PUSH)
        self._erase_script = self._client.register_script(_ERASE)

    async def push(self, rows: Sequence[LogRow]) -> None:
        """See `HistoryStore`."""
        async with _answering(_PATIENCE_S):
            pipeline = self._client.pipeline(transaction=False)
            for row in rows:
                await self._push_script(*self._push_arguments(row), client=pipeline)
            await pipeline.execute()

    async def recent(self, owner: Owner, name: int | str, limit: int) -> tuple[Event, ...]:
        """See `HistoryStore`."""
        kind = "user" if owner == "user_id" else "session"
        async with _answering(self._timeout_s):
            pipeline = self._client.pipeline(transaction=False)
            pipeline.zrange(self._key(kind, name), -limit, -1, withscores=True)
            if owner == "user_id":
                pipeline.mget(self._key("seed", name), self._key("erased", name))
            members, *more = await pipeline.execute()
        seeded = unpack_seed(more[0][0], _integer(more[0][1])) if more else []
        return join_history(seeded, [_event(*member) for member in members], limit)

    async def pushed_until(self, log: str) -> int:
        """See `HistoryStore`."""
        async with _answering(_PATIENCE_S):
            return int(await self._client.get(self._key("log", log)) or 0)

    async def mark_pushed(self, log: str, position: int) -> None:
        """See `HistoryStore`."""
        async with _answering(_PATIENCE_S):
            await self._client.set(self._key("log", log), position)

    async def erase(self, user_id: int | str) -> int:
        """See `HistoryStore`."""
        keys = [self._key(kind, user_id) for kind in ("erased", "user", "seed", "sessions")]
        until_us = round(self._clock() * 1e6)
        arguments: list[Any] = [until_us, str(user_id), self._key("session", "")]
        async with _answering(_PATIENCE_S):
            seed, before_us = await self._client.mget(keys[2], keys[0])
            gone = int(await self._erase_script(keys, arguments))
        return gone + len(unpack_seed(seed, _integer(before_us)))

    def load(self, rows: Iterable[SeedRow]) -> int:
        """See `HistoryStore`."""
        with self._loading() as client:
            return self._load(client, rows)

    def load_once(self, version: str, rows: Callable[[], Iterable[SeedRow]]) -> int:
        """See `HistoryStore`; a version is forgotten with its seeds."""
        mark = self._key("loaded", version)
        with self._loading() as client:
            if client.exists(mark):
                return 0
            total = self._load(client, rows())
            client.set(mark, total, ex=self._ttl_s)
            return total

    async def close(self) -> None:
        await self._client.aclose(close_connection_pool=True)

    def _key(self, kind: str, name: int | str) -> str:
        return f"{self._prefix}{kind}:{name}"

    def _push_arguments(self, row: LogRow) -> tuple[list[str], list[Any]]:
        event = row.event
        user, session = event.user_id or "", event.session_id or ""
        kinds = {"erased": user, "user": user, "session": session, "sessions": user}
        keys = [self._key(kind, name) for kind, name in kinds.items()]
        id_part, rest = _member_parts(event)
        return keys, [
            event.received_us,
            event.timestamp_us,
            f"{row.position:016x}",
            id_part,
            rest,
            self._keep,
            self._ttl_s,
            int(event.user_id is not None),
            session,
        ]

    @contextmanager
    def _loading(self) -> Iterator[redis.Redis]:
        client = redis.Redis.from_url(self._url, socket_timeout=10 * _PATIENCE_S)
        try:
            with client:
                yield client
        except (redis.RedisError, OSError) as error:
            raise HistoryUnavailableError(_told(error)) from error

    def _load(self, client: redis.Redis, rows: Iterable[SeedRow]) -> int:
        total = 0
        seeds = iter(rows)
        while chunk := list(islice(seeds, _LOADED_AT_ONCE)):
            pipeline = client.pipeline(transaction=False)
            for row in chunk:
                pipeline.set(self._key("seed", row.user_id), pack_seed(row), ex=self._ttl_s)
            pipeline.execute()
            total += len(chunk)
        return total


@asynccontextmanager
async def _answering(timeout_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except (TimeoutError, OSError, redis.RedisError) as error:
        raise HistoryUnavailableError(_told(error)) from error


def _told(error: Exception) -> str:
    return f"Redis does not answer ({type(error).__name__}); see whether it runs."


def _member_parts(event: LoggedEvent) -> tuple[str, str]:
    """A member behind its position: a JSON array of the event_id, and the rest of it."""
    rest = [event.item_id, event.event_type, event.device, event.user_id]
    id_part = f"[{json.dumps(event.event_id)},"
    return id_part, json.dumps(rest, separators=(",", ":"))[1:]


def _event(member: bytes, score: float) -> Event:
    _, item_id, event_type, device, _ = json.loads(member[16:])
    return Event(item_id, int(score), event_type, device)


def _integer(value: bytes | str | None) -> int | None:
    return None if value is None else int(value)

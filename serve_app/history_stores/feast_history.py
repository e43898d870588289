"""Histories in a Feast online store, by the repository `cluster/feast`; needs the extra `feast`.

Feast cannot add to an array, so that a push reads what is there, adds and writes it back. Between
the processes of one machine a lock makes that one step. Machines do not see each other's locks: of
two that push for the same visitor in the same milliseconds, the later overwrites the event of the
earlier. The loss is bounded by joining the rows of this machine's own log into every push: the
event is back when its machine next pushes for that visitor, at the latest with the replay of its
log, a second or so later.
"""

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

from recsys.queries import Event
from serve_app.errors import EventsUnavailableError, HistoryUnavailableError
from serve_app.event_log import EventLog, LogRow, Owner, rows_of
from serve_app.file_lock import FileLock
from serve_app.history_stores.feast_online import FeastOnline, Features
from serve_app.history_stores.store import SeedRow, is_after, join_history

T = TypeVar("T")

_PATIENCE_S = 5.0
"""Of pushes and erasures."""
_LOADED_AT_ONCE = 2000
_NO_TIME = -1


class _Kept(NamedTuple):
    """One event in the arrays of a visitor; `""` for what it lacks."""

    item_ids: str
    event_types: str
    timestamps_us: int
    devices: str
    event_ids: str
    positions: int
    user_ids: str
    session_ids: str


class _Batch(NamedTuple):
    rows: list[LogRow]
    done: Future[None]


class FeastHistory:
    """`HistoryStore` in Feast; its calls run in threads of their own.

    Args:
        repo: folder of `feature_store.yaml`.
        log: of this machine; a process that only loads has none.
        timeout_s: bound on a `recent`.
        keep: events that are kept of a visitor.

    Raises: SettingsError when the repository cannot be opened.
    """

    needs_push: ClassVar[bool] = True

    def __init__(
        self,
        repo: Path,
        log: EventLog | None = None,
        *,
        timeout_s: float = 1.0,
        keep: int = 200,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._log = log
        self._timeout_s = timeout_s
        self._keep = keep
        self._clock = clock
        self._lock: AbstractContextManager[None] = nullcontext()
        if log is not None:
            self._lock = FileLock(log.file.path.with_name(f"{log.file.path.name}.feast-lock"))
        with self._lock:
            self._writes = FeastOnline(repo)
        self._reads = FeastOnline(repo)
        self._gate = threading.Lock()
        self._waiting: _Batch | None = None
        # What is slow the first time is not a visitor's to pay.
        self._recent("user_id", "", 1)
        self._writer = ThreadPoolExecutor(1, "feast-writer")
        self._reader = ThreadPoolExecutor(1, "feast-reader")

    async def push(self, rows: Sequence[LogRow]) -> None:
        """See `HistoryStore`; pushes that wait together are one."""
        with self._gate:
            if self._waiting is None:
                self._waiting = _Batch([], self._writer.submit(self._push_waiting))
            self._waiting.rows.extend(rows)
            done = self._waiting.done
        # Others wait for the same batch.
        await _answered(asyncio.shield(asyncio.wrap_future(done)), _PATIENCE_S)

    async def recent(self, owner: Owner, name: int | str, limit: int) -> tuple[Event, ...]:
        """See `HistoryStore`."""
        call = partial(self._recent, owner, str(name), limit)
        return await _run(self._reader, call, self._timeout_s)

    async def pushed_until(self, log: str) -> int:
        """See `HistoryStore`."""
        return await _run(self._writer, partial(self._progress, f"log:{log}"), _PATIENCE_S)

    async def mark_pushed(self, log: str, position: int) -> None:
        """See `HistoryStore`."""
        call = partial(self._set_progress, f"log:{log}", position)
        await _run(self._writer, call, _PATIENCE_S)

    async def erase(self, user_id: int | str) -> int:
        """See `HistoryStore`. The user's sessions are found by the events that are kept of the
        user, and by the log.
        """
        return await _run(self._writer, partial(self._erase, str(user_id)), _PATIENCE_S)

    def load(self, rows: Iterable[SeedRow]) -> int:
        """See `HistoryStore`."""
        return self._writer.submit(self._load, rows).result()

    def load_once(self, version: str, rows: Callable[[], Iterable[SeedRow]]) -> int:
        """See `HistoryStore`."""
        return self._writer.submit(self._load_once, version, rows).result()

    async def close(self) -> None:
        """Waits for what is under way."""
        self._writer.shutdown()
        self._reader.shutdown()

    def _recent(self, owner: Owner, name: str, limit: int) -> tuple[Event, ...]:
        visitor = _session(name) if owner == "session_id" else _user(name)
        names = ("recent_events", "seeded_events", "erasures")
        found = self._reads.read(names[:1] if owner == "session_id" else names, [visitor])[visitor]
        logged = _events(found["recent_events"])
        seeded = _seeded(found) if owner == "user_id" else []
        return join_history(seeded, logged, limit)

    def _push_waiting(self) -> None:
        with self._gate:
            assert self._waiting is not None
            rows, self._waiting = self._waiting.rows, None
        with self._lock:
            visitors = sorted({visitor for row in rows for visitor in _visitors(row)})
            kept = self._kept(visitors)
            for row in self._standing({*rows, *self._logged(visitors)}):
                event = _keep(row)
                for visitor in _visitors(row) & kept.keys():
                    kept[visitor].setdefault(event.event_ids, event)
            self._write_kept(kept)

    def _logged(self, visitors: Sequence[str]) -> list[LogRow]:
        """The last rows of the log of each visitor."""
        if self._log is None:
            return []

        def read(connection: sqlite3.Connection) -> list[LogRow]:
            found = [rows_of(connection, *_owner(one), self._keep) for one in visitors]
            return [row for rows in found for row in rows]

        return self._log.file.read(read)

    def _standing(self, rows: Iterable[LogRow]) -> list[LogRow]:
        """In order, without those from before their user was erased."""
        ordered = sorted(rows, key=lambda row: row.position)
        users = {_user(row.event.user_id) for row in ordered if row.event.user_id is not None}
        found = self._writes.read(["erasures"], sorted(users))
        until = {user: views["erasures"]["until_us"] for user, views in found.items()}
        return [
            row
            for row in ordered
            if row.event.user_id is None
            or is_after(row.event.received_us, until[_user(row.event.user_id)])
        ]

    def _kept(self, visitors: Sequence[str]) -> dict[str, dict[str, _Kept]]:
        """What is there of each visitor, by event_id."""
        found = self._writes.read(["recent_events"], visitors)
        kept = {}
        for visitor, views in found.items():
            columns = [views["recent_events"][name] or [] for name in _Kept._fields]
            events = map(_Kept._make, zip(*columns, strict=True))
            kept[visitor] = {event.event_ids: event for event in events}
        return kept

    def _write_kept(self, kept: dict[str, dict[str, _Kept]]) -> None:
        rows = {}
        for visitor, events in kept.items():
            ordered = sorted(events.values(), key=lambda e: (e.timestamps_us, e.positions))
            last = ordered[-self._keep :]
            rows[visitor] = {
                name: [event[column] for event in last] for column, name in enumerate(_Kept._fields)
            }
        self._writes.write("recent_events", rows)

    def _erase(self, user_id: str) -> int:
        user, until_us = _user(user_id), round(self._clock() * 1e6)
        with self._lock:
            (events,) = self._kept([user]).values()
            seeded = _seeded(self._writes.read(["seeded_events", "erasures"], [user])[user])
            self._writes.write("erasures", {user: {"until_us": until_us}})
            self._writes.write("seeded_events", {user: _seed_features(SeedRow(user, *[()] * 4))})
            logged = self._logged([user])
            sessions = {event.session_ids for event in events.values()}
            sessions |= {row.event.session_id or "" for row in logged}
            kept = self._kept([_session(name) for name in sorted(sessions - {""})])
            for session, found in kept.items():
                kept[session] = {i: e for i, e in found.items() if e.user_ids != user_id}
            self._write_kept({**kept, user: {}})
        return len(events) + len(seeded)

    def _progress(self, name: str) -> int:
        found = self._writes.read(["progress"], [name])
        return found[name]["progress"]["position"] or 0

    def _set_progress(self, name: str, position: int) -> None:
        self._writes.write("progress", {name: {"position": position}})

    def _load(self, rows: Iterable[SeedRow]) -> int:
        total = 0
        seeds = iter(rows)
        while chunk := list(islice(seeds, _LOADED_AT_ONCE)):
            self._writes.write(
                "seeded_events", {_user(row.user_id): _seed_features(row) for row in chunk}
            )
            total += len(chunk)
        return total

    def _load_once(self, version: str, rows: Callable[[], Iterable[SeedRow]]) -> int:
        if self._progress(f"seed:{version}"):
            return 0
        total = self._load(rows())
        self._set_progress(f"seed:{version}", 1)
        return total


async def _run(executor: ThreadPoolExecutor, call: Callable[[], T], timeout_s: float) -> T:
    return await _answered(asyncio.wrap_future(executor.submit(call)), timeout_s)


async def _answered(answer: Awaitable[T], timeout_s: float) -> T:
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except TimeoutError:
        raise HistoryUnavailableError(
            f"Feast did not answer within {timeout_s:g} s; see how its online store is."
        ) from None
    except EventsUnavailableError as error:
        raise HistoryUnavailableError(str(error)) from error


def _user(name: int | str) -> str:
    return f"user:{name}"


def _session(name: str) -> str:
    return f"session:{name}"


def _owner(visitor: str) -> tuple[Owner, str]:
    kind, _, name = visitor.partition(":")
    return ("user_id" if kind == "user" else "session_id"), name


def _visitors(row: LogRow) -> set[str]:
    event = row.event
    users = set() if event.user_id is None else {_user(event.user_id)}
    return users if event.session_id is None else users | {_session(event.session_id)}


def _keep(row: LogRow) -> _Kept:
    event = row.event
    return _Kept(
        json.dumps(event.item_id),
        event.event_type,
        event.timestamp_us,
        event.device or "",
        event.event_id,
        row.position,
        event.user_id or "",
        event.session_id or "",
    )


def _seed_features(row: SeedRow) -> Features:
    return {
        "item_ids": [json.dumps(item_id) for item_id in row.item_ids],
        "event_types": [kind or "" for kind in row.event_types],
        "timestamps_us": [_NO_TIME if time is None else time for time in row.timestamps_us],
        "devices": [device or "" for device in row.devices],
    }


def _seeded(found: dict[str, Features]) -> list[Event]:
    until_us = found["erasures"]["until_us"]
    events = _events(found["seeded_events"])
    return [event for event in events if is_after(event.timestamp_us, until_us)]


def _events(features: Features) -> list[Event]:
    columns = ("item_ids", "timestamps_us", "event_types", "devices")
    rows = zip(*(features[name] or [] for name in columns), strict=True)
    return [
        Event(json.loads(item_id), None if time == _NO_TIME else time, kind or None, device or None)
        for item_id, time, kind, device in rows
    ]

"""What visitors did lately: written before `POST /v1/events` returns, read at every request.

The SQLite file holds the log of raw events, in order of arrival, for the way back to the lake; and
histories that the lake knew already, one row a user.
"""

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from recsys.queries import Event

T = TypeVar("T")
Owner = Literal["user_id", "session_id"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT NOT NULL UNIQUE,
    user_id TEXT, session_id TEXT,
    item_id NOT NULL,
    event_type TEXT NOT NULL, timestamp_us INTEGER NOT NULL,
    device TEXT, price REAL, quantity INTEGER, received_us INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS events_of_user ON events (user_id, timestamp_us, position);
CREATE INDEX IF NOT EXISTS events_of_session ON events (session_id, timestamp_us, position);
CREATE TABLE IF NOT EXISTS seeds (user_id TEXT PRIMARY KEY, events TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS erased (
    user_id TEXT PRIMARY KEY, until_us INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seed_versions (version TEXT PRIMARY KEY) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class LoggedEvent:
    """One row of the event log. Ids of users and sessions are strings here, whatever they were."""

    event_id: str
    user_id: str | None
    session_id: str | None
    item_id: int | str
    event_type: str
    timestamp_us: int
    device: str | None = None
    price: float | None = None
    quantity: int | None = None
    received_us: int = 0


_COLUMNS = tuple(field.name for field in fields(LoggedEvent))


class SeedRow(NamedTuple):
    """The history of one user, oldest first; the lists are of equal length."""

    user_id: int | str
    item_ids: Sequence[int | str]
    event_types: Sequence[str | None]
    timestamps_us: Sequence[int | None]
    devices: Sequence[str | None]


class HistoryStore(Protocol):
    """Where histories are kept."""

    async def append(self, events: Sequence[LoggedEvent]) -> list[bool]:
        """Whether each event is new; returns when all of them are safe."""
        ...

    async def recent(self, owner: Owner, name: int | str, limit: int) -> tuple[Event, ...]:
        """The latest events of a user or session, oldest first."""
        ...

    async def erase(self, user_id: int | str) -> int:
        """Forgets a user; returns the number of events that are gone."""
        ...

    async def close(self) -> None: ...


class SqliteHistory:
    """One file, several processes: readers never wait for a writer (WAL), and a commit is on disk
    before it returns (synchronous=FULL). Blocking calls run in threads of its own.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._clock = clock
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._writer = ThreadPoolExecutor(1, "history-writer")
        self._readers = ThreadPoolExecutor(4, "history-reader")
        self._writer.submit(self._create).result()

    async def append(self, events: Sequence[LoggedEvent]) -> list[bool]:
        """See `HistoryStore`; an event_id that is known already changes nothing."""
        return await self._run(self._writer, lambda: self._append(events))

    async def recent(self, owner: Owner, name: int | str, limit: int) -> tuple[Event, ...]:
        """See `HistoryStore`."""
        return await self._run(self._readers, lambda: self._recent(owner, str(name), limit))

    async def erase(self, user_id: int | str) -> int:
        """See `HistoryStore`; seeds that come later bring nothing from before this moment back."""
        return await self._run(self._writer, lambda: self._erase(str(user_id)))

    async def events_after(self, position: int, limit: int) -> list[tuple[int, LoggedEvent]]:
        """The log from a position on, for its export: at most `limit` pairs of position and event.

        Positions grow and are never used twice.
        """
        return await self._run(self._readers, lambda: self._events_after(position, limit))

    async def close(self) -> None:
        """Waits for what is under way."""
        self.close_now()

    def close_now(self) -> None:
        """`close` for callers without an event loop."""
        self._writer.shutdown()
        self._readers.shutdown()
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def load(self, rows: Iterable[SeedRow]) -> int:
        """Takes histories over from elsewhere, in place of those taken over before; returns their
        number. Blocks.
        """
        return self._writer.submit(self._load, rows).result()

    def load_once(self, version: str, rows: Callable[[], Iterable[SeedRow]]) -> int:
        """`load`, unless this version was loaded before; then 0. A load that broke off is done
        again.
        """
        return self._writer.submit(self._load_once, version, rows).result()

    async def _run(self, executor: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, call)

    def _connect(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            # Closed by `close`, after the thread that used it has ended.
            connection = sqlite3.connect(
                self._path, timeout=30, isolation_level=None, check_same_thread=False
            )
            connection.execute("PRAGMA synchronous=FULL")
            self._local.connection = connection
            self._connections.append(connection)
        return connection

    def _create(self) -> None:
        connection = self._connect()
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(_SCHEMA)

    def _append(self, events: Sequence[LoggedEvent]) -> list[bool]:
        places = ", ".join("?" * len(_COLUMNS))
        statement = f"INSERT OR IGNORE INTO events ({', '.join(_COLUMNS)}) VALUES ({places})"
        with _Transaction(self._connect()) as connection:
            return [connection.execute(statement, astuple(event)).rowcount == 1 for event in events]

    def _recent(self, owner: Owner, name: str, limit: int) -> tuple[Event, ...]:
        connection = self._connect()
        rows = connection.execute(
            "SELECT item_id, timestamp_us, event_type, device FROM events "
            f"WHERE {owner} = ? ORDER BY timestamp_us DESC, position DESC LIMIT ?",
            (name, limit),
        ).fetchall()
        logged = [Event(*row) for row in reversed(rows)]
        if owner == "session_id":
            return tuple(logged)
        # An event may come back from the lake with the next seed.
        known = {(str(event.item_id), event.timestamp_us) for event in logged}
        seeded = [
            event
            for event in self._seeded(connection, name)
            if (str(event.item_id), event.timestamp_us) not in known
        ]
        merged = sorted(seeded + logged, key=lambda event: event.timestamp_us or 0)
        return tuple(merged[-limit:])

    def _seeded(self, connection: sqlite3.Connection, user_id: str) -> list[Event]:
        row = connection.execute(
            "SELECT events, (SELECT until_us FROM erased WHERE user_id = seeds.user_id) "
            "FROM seeds WHERE user_id = ?",
            (user_id,),
        ).fetchone()
        if row is None:
            return []
        events, until_us = row
        return [
            event
            for event in map(Event._make, json.loads(events))
            if until_us is None or (event.timestamp_us or 0) > until_us
        ]

    def _erase(self, user_id: str) -> int:
        with _Transaction(self._connect()) as connection:
            num_seeded = len(self._seeded(connection, user_id))
            connection.execute("DELETE FROM seeds WHERE user_id = ?", (user_id,))
            gone = connection.execute("DELETE FROM events WHERE user_id = ?", (user_id,)).rowcount
            connection.execute(
                "INSERT OR REPLACE INTO erased VALUES (?, ?)",
                (user_id, round(self._clock() * 1e6)),
            )
            return gone + num_seeded

    def _events_after(self, position: int, limit: int) -> list[tuple[int, LoggedEvent]]:
        rows = self._connect().execute(
            f"SELECT position, {', '.join(_COLUMNS)} FROM events WHERE position > ? "
            "ORDER BY position LIMIT ?",
            (position, limit),
        )
        return [(row[0], LoggedEvent(*row[1:])) for row in rows]

    def _load(self, rows: Iterable[SeedRow]) -> int:
        total = 0
        packed = map(_pack, rows)
        while chunk := list(islice(packed, 5000)):
            # Each chunk is a transaction of its own, so that no writer waits long.
            with _Transaction(self._connect()) as connection:
                connection.executemany("INSERT OR REPLACE INTO seeds VALUES (?, ?)", chunk)
            total += len(chunk)
        return total

    def _load_once(self, version: str, rows: Callable[[], Iterable[SeedRow]]) -> int:
        connection = self._connect()
        known = "SELECT 1 FROM seed_versions WHERE version = ?"
        if connection.execute(known, (version,)).fetchone():
            return 0
        total = self._load(rows())
        connection.execute("INSERT OR IGNORE INTO seed_versions VALUES (?)", (version,))
        return total


class _Transaction:
    """BEGIN IMMEDIATE to COMMIT, or ROLLBACK."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> sqlite3.Connection:
        self._connection.execute("BEGIN IMMEDIATE")
        return self._connection

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._connection.execute("COMMIT" if kind is None else "ROLLBACK")


def _pack(row: SeedRow) -> tuple[str, str]:
    events: list[tuple[Any, ...]] = list(
        zip(row.item_ids, row.timestamps_us, row.event_types, row.devices, strict=True)
    )
    return str(row.user_id), json.dumps(events, separators=(",", ":"))

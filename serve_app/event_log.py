"""The log of raw events of one machine: on disk before `POST /v1/events` returns, and read in order
of arrival by whoever carries them on, to the lake or to a history store.
"""

import asyncio
import sqlite3
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from serve_app.sqlite_file import SqliteFile

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
CREATE TABLE IF NOT EXISTS cursors (
    reader TEXT PRIMARY KEY, position INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS log_name (name TEXT PRIMARY KEY) WITHOUT ROWID;
"""
_PRUNED_AT_ONCE = 5000
"""So that no event waits long."""


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


_COLUMNS = ", ".join(field.name for field in fields(LoggedEvent))
_PLACES = ", ".join("?" * len(fields(LoggedEvent)))
_INSERT = f"INSERT OR IGNORE INTO events ({_COLUMNS}) VALUES ({_PLACES})"
_SELECT = f"SELECT position, {_COLUMNS} FROM events"


class LogRow(NamedTuple):
    """An event and where it stands; positions grow in order of commit and are never used twice."""

    position: int
    event: LoggedEvent


class Backlog(NamedTuple):
    """What a reader has not carried on yet."""

    events: int
    """At most so many: events that were erased count."""
    age_s: float
    """Since the oldest of them was received; 0 where none waits."""


class EventLog:
    """One file, several processes. Whoever reads it as a queue keeps a cursor in it.

    Args:
        timeout_s: bound on the wait of an `append` while others hold the file.

    Raises: EventsUnavailableError, here and in every method, when the file cannot be used.
    """

    def __init__(
        self, path: Path, *, timeout_s: float = 2.0, clock: Callable[[], float] = time.time
    ) -> None:
        self.clock = clock
        self.file = SqliteFile(path, _SCHEMA, write_timeout_s=timeout_s)
        self.name = self.file.read(_read_name) or self.file.write(_name_log).result()
        """Of this file alone, however often it is moved or written anew."""
        self._readers = ThreadPoolExecutor(4, "log-reader")

    async def append(self, events: Sequence[LoggedEvent]) -> list[int | None]:
        """The position of each event, None where its event_id was known already; returns when all
        are on disk.
        """
        return await asyncio.wrap_future(self.file.write(partial(_append, events=events)))

    async def read(self, call: Callable[[sqlite3.Connection], T]) -> T:
        """Runs a query in a thread that reads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, self.file.read, call)

    async def erase(self, user_id: int | str) -> int:
        """Deletes what is here of a user, shipped or not; returns the number of events."""
        call = partial(delete_user, user_id=str(user_id))
        return await asyncio.wrap_future(self.file.write(call))

    def rows_after(self, position: int, limit: int) -> list[LogRow]:
        """See the function of this name. Blocks, as what follows does."""
        return self.file.read(partial(rows_after, position=position, limit=limit))

    def last_position(self) -> int:
        """See the function of this name."""
        return self.file.read(last_position)

    def cursor(self, reader: str) -> int:
        """How far a reader has come; 0 at first."""
        query = "SELECT position FROM cursors WHERE reader = ?"
        row = self.file.read(lambda connection: connection.execute(query, (reader,)).fetchone())
        return int(row[0]) if row else 0

    def backlog(self, reader: str) -> Backlog:
        """What waits for a reader."""
        position = self.cursor(reader)
        waiting = self.rows_after(position, 1)
        if not waiting:
            return Backlog(0, 0.0)
        age_s = self.clock() - waiting[0].event.received_us / 1e6
        return Backlog(self.last_position() - position, max(0.0, age_s))

    def advance(self, reader: str, position: int) -> None:
        """Remembers that everything up to a position was carried on; never goes back."""
        statement = (
            "INSERT INTO cursors VALUES (?, ?) ON CONFLICT (reader) "
            "DO UPDATE SET position = max(position, excluded.position)"
        )
        self.file.write(
            lambda connection: connection.execute(statement, (reader, position))
        ).result()

    def prune(self, before_us: int) -> int:
        """Deletes rows that were received before a moment and that every reader has carried on;
        none while there is no reader. Returns their number.
        """
        total = 0
        while True:
            deleted = self.file.write(partial(_prune_some, before_us=before_us)).result()
            total += deleted
            if deleted < _PRUNED_AT_ONCE:
                return total

    def close(self) -> None:
        """Waits for what is under way."""
        self._readers.shutdown()
        self.file.close()


def last_position(connection: sqlite3.Connection) -> int:
    """Of the newest event; 0 in an empty log."""
    query = "SELECT coalesce(max(position), 0) FROM events"
    return int(connection.execute(query).fetchone()[0])


def rows_after(connection: sqlite3.Connection, position: int, limit: int) -> list[LogRow]:
    """At most `limit` rows behind a position, in order."""
    query = f"{_SELECT} WHERE position > ? ORDER BY position LIMIT ?"
    return _rows(connection.execute(query, (position, limit)))


def rows_of(connection: sqlite3.Connection, owner: Owner, name: str, limit: int) -> list[LogRow]:
    """The last rows of a user or session by time, then position; newest first."""
    query = f"{_SELECT} WHERE {owner} = ? ORDER BY timestamp_us DESC, position DESC LIMIT ?"
    return _rows(connection.execute(query, (name, limit)))


def delete_user(connection: sqlite3.Connection, user_id: str) -> int:
    """Deletes the events of a user; returns their number."""
    return connection.execute("DELETE FROM events WHERE user_id = ?", (user_id,)).rowcount


def _rows(cursor: sqlite3.Cursor) -> list[LogRow]:
    return [LogRow(row[0], LoggedEvent(*row[1:])) for row in cursor]


def _append(connection: sqlite3.Connection, events: Sequence[LoggedEvent]) -> list[int | None]:
    inserted = (connection.execute(_INSERT, astuple(event)) for event in events)
    return [cursor.lastrowid if cursor.rowcount == 1 else None for cursor in inserted]


def _read_name(connection: sqlite3.Connection) -> str | None:
    row = connection.execute("SELECT name FROM log_name").fetchone()
    return str(row[0]) if row else None


def _name_log(connection: sqlite3.Connection) -> str:
    # Another process may have been faster.
    name = _read_name(connection) or uuid.uuid4().hex[:12]
    connection.execute("INSERT OR IGNORE INTO log_name VALUES (?)", (name,))
    return name


def _prune_some(connection: sqlite3.Connection, before_us: int) -> int:
    # The oldest come first; what lies beyond them is not looked at.
    return connection.execute(
        "DELETE FROM events WHERE position IN (SELECT position FROM ("
        "SELECT position, received_us FROM events "
        "WHERE position <= (SELECT min(position) FROM cursors) ORDER BY position LIMIT ?"
        ") WHERE received_us < ?)",
        (_PRUNED_AT_ONCE, before_us),
    ).rowcount

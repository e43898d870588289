"""Histories in the file of the event log: what was appended is in the history, with no second
write. For one machine.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import ClassVar, TypeVar

from recsys.queries import Event
from serve_app.errors import EventsUnavailableError, HistoryUnavailableError
from serve_app.event_log import EventLog, LogRow, Owner, delete_user, last_position
from serve_app.history_stores.store import SeedRow, join_history, pack_seed, unpack_seed
from serve_app.sqlite_file import transaction

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS seeds (user_id TEXT PRIMARY KEY, events TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS erased (
    user_id TEXT PRIMARY KEY, until_us INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seed_versions (version TEXT PRIMARY KEY) WITHOUT ROWID;
"""
_LOADED_AT_ONCE = 5000


class SqliteHistory:
    """`HistoryStore` over the rows of the log.

    Args:
        timeout_s: bound on a `recent`.
    """

    needs_push: ClassVar[bool] = False

    def __init__(self, log: EventLog, *, timeout_s: float = 1.0) -> None:
        self._log = log
        self._timeout_s = timeout_s
        log.file.read(lambda connection: connection.executescript(_SCHEMA))

    async def push(self, rows: Sequence[LogRow]) -> None:
        """What is in the log is here."""

    async def pushed_until(self, log: str) -> int:
        """See `HistoryStore`."""
        return await self._log.read(last_position)

    async def mark_pushed(self, log: str, position: int) -> None:
        """Nothing has to be remembered."""

    async def recent(self, owner: Owner, name: int | str, limit: int) -> tuple[Event, ...]:
        """See `HistoryStore`."""
        query = partial(_recent, owner=owner, name=str(name), limit=limit)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._log.read(query)
        except (TimeoutError, EventsUnavailableError) as error:
            raise HistoryUnavailableError(f"{self._log.file.path} cannot be read now.") from error

    async def erase(self, user_id: int | str) -> int:
        """See `HistoryStore`; the user's rows of the log are deleted."""
        until_us = round(self._log.clock() * 1e6)
        call = partial(_erase, user_id=str(user_id), until_us=until_us)
        try:
            return await asyncio.wrap_future(self._log.file.write(call))
        except EventsUnavailableError as error:
            raise HistoryUnavailableError(str(error)) from error

    def load(self, rows: Iterable[SeedRow]) -> int:
        """See `HistoryStore`."""
        return self._log.file.read(partial(_load, rows=rows))

    def load_once(self, version: str, rows: Callable[[], Iterable[SeedRow]]) -> int:
        """See `HistoryStore`."""
        return self._log.file.read(partial(_load_once, version=version, rows=rows))

    async def close(self) -> None:
        """The log is closed by whoever opened it."""


def _recent(
    connection: sqlite3.Connection, *, owner: Owner, name: str, limit: int
) -> tuple[Event, ...]:
    rows = connection.execute(
        "SELECT item_id, timestamp_us, event_type, device FROM events "
        f"WHERE {owner} = ? ORDER BY timestamp_us DESC, position DESC LIMIT ?",
        (name, limit),
    ).fetchall()
    logged = [Event(*row) for row in reversed(rows)]
    seeded = _seeded(connection, name) if owner == "user_id" else []
    return join_history(seeded, logged, limit)


def _seeded(connection: sqlite3.Connection, user_id: str) -> list[Event]:
    row = connection.execute(
        "SELECT events, (SELECT until_us FROM erased WHERE user_id = seeds.user_id) "
        "FROM seeds WHERE user_id = ?",
        (user_id,),
    ).fetchone()
    return unpack_seed(*row) if row else []


def _erase(connection: sqlite3.Connection, *, user_id: str, until_us: int) -> int:
    num_seeded = len(_seeded(connection, user_id))
    connection.execute("DELETE FROM seeds WHERE user_id = ?", (user_id,))
    connection.execute("INSERT OR REPLACE INTO erased VALUES (?, ?)", (user_id, until_us))
    return num_seeded + delete_user(connection, user_id)


def _load(connection: sqlite3.Connection, *, rows: Iterable[SeedRow]) -> int:
    total = 0
    packed = ((str(row.user_id), pack_seed(row)) for row in rows)
    while chunk := list(islice(packed, _LOADED_AT_ONCE)):
        # Each chunk is a transaction of its own, so that no event waits long.
        with transaction(connection):
            connection.executemany("INSERT OR REPLACE INTO seeds VALUES (?, ?)", chunk)
        total += len(chunk)
    return total


def _load_once(
    connection: sqlite3.Connection, *, version: str, rows: Callable[[], Iterable[SeedRow]]
) -> int:
    known = "SELECT 1 FROM seed_versions WHERE version = ?"
    if connection.execute(known, (version,)).fetchone():
        return 0
    total = _load(connection, rows=rows())
    connection.execute("INSERT OR IGNORE INTO seed_versions VALUES (?)", (version,))
    return total

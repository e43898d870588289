"""One SQLite file for many threads and processes: a connection for each thread that reads, and one
thread that writes.

Calls that wait for the writer together share one transaction, and so one fsync (group commit).
"""

import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from serve_app.errors import EventsUnavailableError
from serve_app.file_lock import FileLock

T = TypeVar("T")
Call = Callable[[sqlite3.Connection], T]

_LONGEST_BATCH = 256
_PATIENCE_S = 30.0
"""Of what nobody waits for: the creation of the file and loads into it."""


class SqliteFile:
    """Readers never wait for a writer (WAL), and a commit is on disk before it returns
    (synchronous=FULL).

    Args:
        schema: statements that create what is not there yet.
        write_timeout_s: bound on the wait of a `write`, whoever holds the file.

    Raises: EventsUnavailableError when the file cannot be opened.
    """

    def __init__(self, path: Path, schema: str, *, write_timeout_s: float = 2.0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._write_timeout_s = write_timeout_s
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._writes: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._is_closed = False
        # Two processes that turn the same new file to WAL at a time would fail: SQLite does not
        # wait there.
        with naming(path), FileLock(path.with_name(f"{path.name}.lock")):
            connection = self.connect()
            connection.execute("PRAGMA journal_mode=WAL")
            connection.executescript(schema)
        self._writer = threading.Thread(target=self._write_forever, name="sqlite-writer")
        self._writer.daemon = True
        self._writer.start()

    def write(self, call: Call[T]) -> "Future[T]":
        """Runs `call` in a transaction that is on disk when the result is there.

        The future raises EventsUnavailableError when the file is locked for too long or cannot be
        written, and what `call` itself raised; nothing of the call stays then.
        """
        future: Future[T] = Future()
        if self._is_closed:
            future.set_exception(EventsUnavailableError(f"{self.path} was closed."))
        else:
            self._writes.put(_Write(call, future))
        return future

    def read(self, call: Call[T]) -> T:
        """Runs `call` in this thread. Raises: EventsUnavailableError when the file is broken."""
        with naming(self.path):
            return call(self.connect())

    def connect(self) -> sqlite3.Connection:
        """The connection of this thread; `close` closes it."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(
                self.path, timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False
            )
            connection.execute("PRAGMA synchronous=FULL")
            self._local.connection = connection
            self._connections.append(connection)
        return connection

    def close(self) -> None:
        """Waits for the writes that were asked for; no other thread may be reading any more."""
        if self._is_closed:
            return
        self._is_closed = True
        self._writes.put(None)
        self._writer.join()
        for connection in self._connections:
            connection.close()

    def _write_forever(self) -> None:
        is_open = True
        while is_open:
            batch = [self._writes.get()]
            while len(batch) < _LONGEST_BATCH and not self._writes.empty():
                batch.append(self._writes.get())
            is_open = None not in batch
            # What nobody waits for any more is not begun.
            writes = [one for one in batch if one and one.future.set_running_or_notify_cancel()]
            if writes:
                self._commit(writes)

    def _commit(self, writes: "list[_Write]") -> None:
        waited_s = time.monotonic() - writes[0].since
        try:
            with naming(self.path):
                connection = self.connect()
                left_ms = max(0, round(1000 * (self._write_timeout_s - waited_s)))
                connection.execute(f"PRAGMA busy_timeout={left_ms}")
                with transaction(connection):
                    for write in writes:
                        write.run(connection)
        except Exception as error:
            for write in writes:
                write.future.set_exception(error)
            return
        for write in writes:
            write.settle()


@dataclass
class _Write:
    """A call, and what came of it; its future is told after the commit."""

    call: Call[Any]
    future: "Future[Any]"
    since: float = field(default_factory=time.monotonic)
    result: Any = None
    error: Exception | None = None

    def run(self, connection: sqlite3.Connection) -> None:
        """An error of the call itself undoes this call only; one of the file ends the batch."""
        connection.execute("SAVEPOINT one")
        try:
            self.result = self.call(connection)
        except Exception as error:
            if _is_of_the_file(error):
                raise
            self.error = error
            connection.execute("ROLLBACK TO one")
        connection.execute("RELEASE one")

    def settle(self) -> None:
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """BEGIN IMMEDIATE to COMMIT, or ROLLBACK."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # SQLite itself has rolled back when its disk was full.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes EventsUnavailableError of whatever SQLite says of its file."""
    try:
        yield
    except sqlite3.Error as error:
        if not _is_of_the_file(error):
            raise
        raise EventsUnavailableError(
            f"{path} cannot be used ({error}); look for a process that locks it, and at its disk."
        ) from error


def _is_of_the_file(error: Exception) -> bool:
    """Whether the file is to blame (locked, full, broken), and not what was asked for."""
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError

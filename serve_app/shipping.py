"""Served events on their way to the lake: rows of the event log become Parquet files in the landing
folder, which `ray_jobs.ingest` reads.

A file is whole or not there, and the log remembers how far it was shipped. Who is killed between
the two leaves rows that come again in another file; ingest takes an event once, by its event_id.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from serve_app.errors import EventsUnavailableError
from serve_app.event_log import Backlog, EventLog, LogRow
from serve_app.file_lock import FileLock

log = logging.getLogger(__name__)

READER = "lake"
"""Name of the cursor."""
_LOOKS_EVERY_S = 1.0
_LONGEST_PAUSE_S = 60.0
_PRUNES_EVERY_S = 600.0
_TIME = pa.timestamp("us", tz="UTC")
_SCHEMA = pa.schema(
    [
        ("event_id", pa.string()),
        ("user_id", pa.string()),
        ("session_id", pa.string()),
        # Numbers and texts in one log; ingest makes of them what the lake has.
        ("item_id", pa.string()),
        ("event_type", pa.string()),
        ("timestamp", _TIME),
        ("device", pa.string()),
        ("price", pa.float64()),
        ("quantity", pa.int64()),
        ("received_at", _TIME),
    ]
)


class Shipper:
    """Carries the rows of one log to the landing folder, in a thread.

    Of the processes that share a log one ships; when it ends, however it does, another takes over.

    Args:
        landing: a folder, or a URI that Arrow knows.
        on_backlog: is told what waits at every look at the log, in every process.
    """

    def __init__(
        self,
        events: EventLog,
        landing: str,
        *,
        every_s: float = 30.0,
        max_rows: int = 50_000,
        keep_days: float = 30.0,
        on_backlog: Callable[[Backlog], None] = lambda backlog: None,
    ) -> None:
        self._events = events
        self._on_backlog = on_backlog
        self._landing = landing
        self._every_s = every_s
        self._max_rows = max_rows
        self._kept = timedelta(days=keep_days)
        path = events.file.path
        self._lock = FileLock(path.with_name(f"{path.name}.ship-lock"))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._shipped_at = time.monotonic()
        self._pruned_at = float("-inf")

    def start(self) -> None:
        """Ships from now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ships what waits, and ends."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def ship(self) -> int:
        """Ships everything that waits, and prunes; returns the number of rows.

        Raises: OSError or ArrowException when the landing folder cannot be written,
            EventsUnavailableError when the log cannot be used.
        """
        total = 0
        position = self._events.cursor(READER)
        while rows := self._events.rows_after(position, self._max_rows):
            self._write(rows)
            position = rows[-1].position
            self._events.advance(READER, position)
            total += len(rows)
        self._shipped_at = time.monotonic()
        self._prune()
        return total

    def _run(self) -> None:
        pause_s = first_s = min(_LOOKS_EVERY_S, self._every_s)
        while not self._stop.wait(pause_s):
            pause_s = first_s if self._ship_if_due() else min(2 * pause_s, _LONGEST_PAUSE_S)
        self._shipped_at = float("-inf")
        self._ship_if_due()
        self._lock.release()

    def _ship_if_due(self) -> bool:
        """Whether nothing went wrong."""
        try:
            self._on_backlog(self._events.backlog(READER))
            if self._lock.acquire() and self._is_due():
                self.ship()
        except (OSError, pa.ArrowException, EventsUnavailableError) as error:
            # A URI may hold a key.
            log.warning("Events cannot be shipped now and wait (%s).", type(error).__name__)
            return False
        return True

    def _is_due(self) -> bool:
        if time.monotonic() - self._shipped_at >= self._every_s:
            return True
        return self._events.last_position() - self._events.cursor(READER) >= self._max_rows

    def _write(self, rows: Sequence[LogRow]) -> None:
        name = f"{self._events.name}-{rows[0].position:012d}-{rows[-1].position:012d}.parquet"
        buffer = pa.BufferOutputStream()
        pq.write_table(to_table(rows), buffer)
        write_whole(self._landing, name, buffer.getvalue())

    def _prune(self) -> None:
        if time.monotonic() - self._pruned_at >= _PRUNES_EVERY_S:
            kept_s = self._kept.total_seconds()
            self._events.prune(round((self._events.clock() - kept_s) * 1e6))
            self._pruned_at = time.monotonic()


def to_table(rows: Sequence[LogRow]) -> pa.Table:
    """Rows of the log as a file of the landing folder has them."""
    events = [row.event for row in rows]
    columns = {
        "item_id": [str(event.item_id) for event in events],
        "timestamp": _times([event.timestamp_us for event in events]),
        "received_at": _times([event.received_us for event in events]),
    }
    same = [name for name in _SCHEMA.names if name not in columns]
    columns |= {name: [getattr(event, name) for event in events] for name in same}
    return pa.table(columns, schema=_SCHEMA)


def write_whole(folder: str, name: str, content: pa.Buffer) -> None:
    """A file that is whole, and on disk, before it has its name; hidden names are not read."""
    filesystem, path = (
        pafs.FileSystem.from_uri(folder) if "://" in folder else (pafs.LocalFileSystem(), folder)
    )
    is_local = isinstance(filesystem, pafs.LocalFileSystem)
    # An object appears when its upload is complete. A file that was left over is written again.
    written = f"{path}/.{name.partition('-')[0]}" if is_local else f"{path}/{name}"
    if is_local:
        filesystem.create_dir(path, recursive=True)
    with filesystem.open_output_stream(written) as stream:
        stream.write(content)
    if is_local:
        _sync(written)
        filesystem.move(written, f"{path}/{name}")
        _sync(path)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _times(moments_us: Sequence[int]) -> pa.Array:
    return pa.array(moments_us, pa.int64()).cast(_TIME)

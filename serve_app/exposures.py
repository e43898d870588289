"""The log of lists that were shown: what a click or a purchase is joined with later, by its
recommendation_id.

Parquet files in a folder or an object store, one of some seconds, written beside their name and
renamed. A process that is killed loses the lists of its last seconds, and no answer waits for them.
"""

import logging
import threading
import uuid
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from serve_app.metrics import Metrics
from serve_app.settings import Settings

log = logging.getLogger(__name__)

_MAX_WAITING = 200_000
SCHEMA = pa.schema(
    [
        ("recommendation_id", pa.string()),
        ("user_id", pa.string()),
        ("session_id", pa.string()),
        ("timestamp", pa.timestamp("us", tz="UTC")),
        ("model_version", pa.string()),
        ("source", pa.string()),
        ("degraded", pa.bool_()),
        ("item_ids", pa.list_(pa.string())),
        ("top_score", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Exposure:
    """One list that was given. Ids are strings, whatever the shop's are."""

    recommendation_id: str
    user_id: str | None
    session_id: str | None
    timestamp: int
    """Microseconds in UTC."""
    model_version: str
    """The version that the visitor was assigned to, also where a lower rung answered."""
    source: str
    degraded: bool
    item_ids: tuple[str, ...]
    top_score: float | None = None
    """Of the first item, where the model gave it; comparable within one version."""


class ExposureLog:
    """Collects lists and writes them every `every_s` in a thread of its own.

    Args:
        uri: a folder, or an address such as s3://shop/exposures.
    """

    def __init__(self, uri: str, metrics: Metrics, *, every_s: float = 5.0) -> None:
        self._files, self._root = _open_folder(uri)
        self._metrics = metrics
        self._waiting: deque[Exposure] = deque()
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._write_all, args=(every_s,), name="exposures", daemon=True
        )
        self._thread.start()

    def add(self, exposure: Exposure) -> None:
        """Takes a list; never blocks. When nothing can be written for long, lists are lost and
        counted.
        """
        if len(self._waiting) >= _MAX_WAITING:
            self._metrics.exposures.labels("lost").inc()
            return
        self._waiting.append(exposure)

    def close(self) -> None:
        """Writes what waits, and ends."""
        self._closing.set()
        self._thread.join()

    def _write_all(self, every_s: float) -> None:
        while not self._closing.wait(every_s):
            self._write_waiting()
        self._write_waiting()

    def _write_waiting(self) -> None:
        rows = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not rows:
            return
        try:
            self._write(rows)
        except OSError as error:
            # Back where they came from, for the next time.
            self._waiting.extendleft(reversed(rows))
            log.warning("%d exposures cannot be written now: %s", len(rows), error)
            return
        self._metrics.exposures.labels("logged").inc(len(rows))

    def _write(self, rows: list[Exposure]) -> None:
        table = pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)
        name = f"exposures-{rows[0].timestamp}-{uuid.uuid4().hex}.parquet"
        temporary = f"{self._root}/.{name}"
        pq.write_table(table, temporary, filesystem=self._files, compression="zstd")
        self._files.move(temporary, f"{self._root}/{name}")


def open_exposures(settings: Settings, metrics: Metrics) -> ExposureLog | None:
    """The log that the settings name, if any."""
    return None if settings.exposures is None else ExposureLog(settings.exposures, metrics)


def _open_folder(uri: str) -> tuple[pafs.FileSystem, str]:
    if "://" in uri:
        files, root = pafs.FileSystem.from_uri(uri)
        return files, root
    Path(uri).mkdir(parents=True, exist_ok=True)
    return pafs.LocalFileSystem(), uri

"""Histories that the lake knows, as a Parquet file or a folder of them.

Columns: `user_id`, and lists of equal length, oldest first: `item_ids`, `event_types`, `timestamps`
(microseconds in UTC, as timestamps or integers) and `devices`; the last fifty events or so.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.artifact import sha256_of
from serve_app.errors import SettingsError
from serve_app.history_stores.store import HistoryStore, SeedRow

log = logging.getLogger(__name__)

NAME = "history_seed"
_COLUMNS = ["user_id", "item_ids", "event_types", "timestamps", "devices"]


def find_seed(configured: Path | None, artifact: Path) -> Path | None:
    """The configured seed, else `history_seed.parquet` or the folder `history_seed` of the
    artifact, else None. Raises SettingsError when the configured one does not exist.
    """
    if configured is not None:
        if not configured.exists():
            raise SettingsError(f"history_seed {configured} does not exist; write it or unset it.")
        return configured
    inside = (artifact / f"{NAME}.parquet", artifact / NAME)
    return next((path for path in inside if path.exists()), None)


def load_seed(history: HistoryStore, seed: Path) -> int:
    """Loads a seed unless the same bytes were loaded before; returns the number of users.

    Raises: SettingsError when there is no Parquet file, or one lacks a column.
    """
    files = sorted(seed.rglob("*.parquet")) if seed.is_dir() else [seed]
    if not files:
        raise SettingsError(f"history_seed {seed} holds no Parquet file; write it or unset it.")
    version = hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()
    num_users = history.load_once(version, lambda: read_rows(files))
    log.info("history seed %s: %d users loaded", seed, num_users)
    return num_users


def read_rows(files: Sequence[Path]) -> Iterator[SeedRow]:
    """The rows of Parquet files. Raises: SettingsError when one lacks a column."""
    for path in files:
        with pq.ParquetFile(path) as file:
            missing = sorted(set(_COLUMNS) - set(file.schema_arrow.names))
            if missing:
                raise SettingsError(
                    f"history_seed {path} lacks {', '.join(missing)}; it needs "
                    f"{', '.join(_COLUMNS)}."
                )
            for batch in file.iter_batches(10_000, columns=_COLUMNS):
                yield from _batch_rows(batch)


def _batch_rows(batch: pa.RecordBatch) -> Iterator[SeedRow]:
    times = batch["timestamps"].cast(pa.list_(pa.timestamp("us", tz="UTC")))
    columns = {name: batch[name].to_pylist() for name in _COLUMNS if name != "timestamps"}
    columns["timestamps"] = times.cast(pa.list_(pa.int64())).to_pylist()
    yield from map(SeedRow._make, zip(*(columns[name] for name in _COLUMNS), strict=True))

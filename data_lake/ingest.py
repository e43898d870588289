"""The first step of an ingest, which runs anywhere: what a source has, and its rows as events.

Bad rows are written to quarantine here, uncommitted; good ones go on to `exchange`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data_lake.buckets import bucket_of
from data_lake.delta_source import look_at_table
from data_lake.errors import SourceError
from data_lake.normalise import Normalised, derive_event_ids, normalise
from data_lake.readers import read_part
from data_lake.schemas import PARTITION, TIMESTAMP, quarantine_schema
from data_lake.sources import Part, SourceConfig, cut_file, digest_file
from data_lake.storage import Options
from data_lake.tables import Part as WrittenPart
from data_lake.written import Written, write_rows

ROWS_OF_A_PART = 2**32
"""At most: the arrival of a row is its place in its part, and so many for each part before."""
_BATCH_ROWS = 500_000
"""Events that are handed on at a time: enough for few pieces, and few enough for memory."""


@dataclass(frozen=True)
class SourceFile:
    """A file (or a Delta table) that was found, and the parts that it is read in."""

    source: SourceConfig
    path: str
    digest: str
    parts: list[Part]

    def transaction(self, kind: str) -> tuple[str, int]:
        """Under which the log of a table remembers the file."""
        return f"{kind}:{self.digest}", 1


@dataclass(frozen=True)
class PartTask:
    """One part of one source, and its place among all parts of the run."""

    source: SourceConfig
    part: Part
    index: int
    digest: str = ""
    """Of the file that it is a part of."""
    is_quarantined: bool = False
    """An earlier run has committed the bad rows of this file, and was cut short then."""


@dataclass(frozen=True)
class Target:
    """Where a run writes, and when it began."""

    lake_uri: str
    options: Mapping[str, str]
    schema: pa.Schema
    """Of the table, which may have more columns than the configuration names."""
    num_buckets: int
    started_us: int
    """Microseconds since 1970."""


@dataclass(frozen=True)
class PartReport:
    """How many rows (some of) a part had, and where its bad ones were written."""

    digest: str
    num_read: int
    num_rejected: int
    quarantine: WrittenPart | None


def look_at(source: SourceConfig, path: str, options: Options | None = None) -> SourceFile:
    """Digest and parts of one file, its columns checked. Raises: SourceError."""
    if source.format == "delta":
        return SourceFile(source, path, *look_at_table(source, path, options))
    try:
        return SourceFile(source, path, digest_file(path, options), cut_file(source, path, options))
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read ({error}); give the job the right to, or take it away."
        ) from None


def load_part(task: PartTask, target: Target) -> Iterator[tuple[PartReport, pa.Table]]:
    """Reads and checks a part and writes its bad rows to quarantine, uncommitted.

    Gives the good rows, so many at a time, with those columns that the source has.
    """
    for raw in read_part(task.source, task.part, target.options):
        checked = normalise(raw, task.source, target.schema, now_us=target.started_us)
        quarantine = _write_rejected(checked, task, target)
        num_rejected = checked.rejected.num_rows
        yield PartReport(task.digest, raw.num_read, num_rejected, quarantine), checked.rows


def load_rows(task: PartTask, target: Target) -> tuple[list[PartReport], pa.Table]:
    """All of a part at once, for tables that are small. If it fails, nothing stays written."""
    with Written(target.lake_uri, target.options) as written:
        reports, tables = [], [_no_rows(task, target)]
        for report, rows in load_part(task, target):
            written.add("quarantine", report.quarantine)
            reports.append(report)
            tables.append(rows)
        return reports, pa.concat_tables(tables)


def load_events(
    tasks: Sequence[PartTask], target: Target
) -> Iterator[tuple[list[PartReport], pa.Table]]:
    """Parts as events, ordered by bucket and arrival; small parts together, large ones in batches.

    If it fails, nothing stays written.
    """
    with Written(target.lake_uri, target.options) as written:
        for batch in _batches(_load_completed(tasks, target, written), _BATCH_ROWS):
            reports = [report for report, _ in batch]
            # Sources may differ in their columns.
            events = pa.concat_tables((rows for _, rows in batch), promote_options="default")
            yield reports, order_by_bucket(events)


def complete_events(rows: pa.Table, task: PartTask, target: Target, first_row: int = 0) -> pa.Table:
    """Adds what the source does not say: ids, arrival and bucket.

    Args:
        first_row: how many rows of the part came before.
    """
    if "event_id" not in rows.column_names:
        rows = rows.append_column("event_id", derive_event_ids(rows))
    arrival = task.index * ROWS_OF_A_PART + first_row + np.arange(rows.num_rows)
    buckets = bucket_of(rows["user_id"], target.num_buckets)
    rows = rows.append_column("arrival", pa.array(arrival, pa.int64()))
    return rows.append_column(PARTITION, pa.array(buckets, pa.int32()))


def order_by_bucket(events: pa.Table) -> pa.Table:
    """Events by bucket, and as they came within one."""
    # A stable sort of 16-bit numbers is a radix sort.
    order = np.argsort(events[PARTITION].to_numpy().astype(np.int16), kind="stable")
    return events.combine_chunks().take(pa.array(order))


def constant_time(time_us: int, num_rows: int) -> pa.Array:
    """The same moment in every row."""
    return pa.array(np.full(num_rows, time_us), pa.int64()).cast(TIMESTAMP)


def _load_completed(
    tasks: Sequence[PartTask], target: Target, written: Written
) -> Iterator[tuple[PartReport, pa.Table]]:
    for task in tasks:
        first_row = 0
        for report, rows in load_part(task, target):
            written.add("quarantine", report.quarantine)
            yield report, complete_events(rows, task, target, first_row)
            first_row += rows.num_rows


def _batches(
    loaded: Iterable[tuple[PartReport, pa.Table]], num_rows: int
) -> Iterator[list[tuple[PartReport, pa.Table]]]:
    """What was loaded, joined until it has `num_rows` rows."""
    batch: list[tuple[PartReport, pa.Table]] = []
    for one in loaded:
        batch.append(one)
        if sum(rows.num_rows for _, rows in batch) >= num_rows:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_rejected(checked: Normalised, task: PartTask, target: Target) -> WrittenPart | None:
    rejected = checked.rejected
    if rejected.num_rows == 0 or task.is_quarantined:
        return None
    source = pa.repeat(task.part.path, rejected.num_rows)
    ingested_at = constant_time(target.started_us, rejected.num_rows)
    columns = [rejected["raw"], rejected["reason"], source, ingested_at]
    rows = pa.table(columns, schema=quarantine_schema())
    return write_rows(target.lake_uri, "quarantine", rows, options=target.options)


def _no_rows(task: PartTask, target: Target) -> pa.Table:
    given = {*task.source.columns, *task.source.constants}
    return pa.schema([field for field in target.schema if field.name in given]).empty_table()

"""How events travel from the tasks that load them to the tasks that merge their buckets: packed, as
arguments of plain tasks, or through one shuffle of Ray Data.

Both load the same parts in the same order of arrival and merge to the same table.
"""

import logging
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import RayTaskError

from data_lake.errors import LakeError
from data_lake.exchange import (
    Files,
    MergeReport,
    all_columns,
    cut_groups,
    group_edges,
    merge_events,
    merge_pieces,
    pack,
)
from data_lake.ingest import PartReport, PartTask, Target, load_events
from data_lake.schemas import PARTITION
from data_lake.written import Written

log = logging.getLogger(__name__)

_MAX_GROUPS = 64
"""Groups of buckets in one run: as many pieces come of a load, and so much is merged at once."""
_TASKS_PER_CPU = 2
"""Tasks under way: the next one waits beside each that runs, and the rest is not submitted yet."""
_REPORT = "report"
"""A column that is null in events; a row that has it is a report and no event."""

Submitted = TypeVar("Submitted")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Exchanged:
    """What came of all parts of a run; its files are written, and not committed."""

    loaded: list[PartReport]
    merged: list[MergeReport]


def exchange_pieces(
    tasks: Sequence[PartTask], target: Target, existing: Files, written: Written
) -> Exchanged:
    """Parts to groups of buckets, then each group merged: two rounds of plain tasks.

    Pieces that do not fit the object store wait on disk. Raises: SourceError, TableError.
    """
    num_groups = min(target.num_buckets, _MAX_GROUPS)
    load = ray.remote(_load_pieces).options(num_returns="streaming")
    loading = (load.remote(some, target, num_groups) for some in _join_small(tasks))
    reports: list[PartReport] = []
    pieces: list[list[Any]] = [[] for _ in range(num_groups)]

    def finish_load(generator: Any) -> None:
        # What a task raised is its last object too.
        *found, last = generator
        loaded: list[PartReport] = get(last)
        written.add("quarantine", *(report.quarantine for report in loaded))
        reports.extend(loaded)
        for position, piece in enumerate(found):
            pieces[position % num_groups].append(piece)

    def finish_merge(reference: Any) -> MergeReport:
        merged: MergeReport = get(reference)
        written.add("events", *merged.parts)
        return merged

    finish_in_order(loading, finish_load)
    merge = ray.remote(merge_pieces)
    # The pieces of a group may go as soon as it is merged: nobody else holds on to them.
    merging = (
        merge.remote(_of_buckets(existing, start, stop), target, *pieces.pop(0))
        for start, stop in pairwise(group_edges(target.num_buckets, num_groups))
        if reports
    )
    return Exchanged(reports, finish_in_order(merging, finish_merge))


def exchange_by_shuffle(
    tasks: Sequence[PartTask], target: Target, existing: Files, written: Written
) -> Exchanged:
    """The same by one shuffle of Ray Data, which brings the rows of each bucket together.

    Raises: SourceError, TableError.
    """
    batches = list(_join_small(tasks))
    if not batches:
        return Exchanged([], [])
    num_blocks = min(target.num_buckets, _MAX_GROUPS)

    def load(rows: pa.Table) -> Iterator[pa.Table]:
        for position in rows["batch"].to_pylist():
            yield from _load_rows(batches[position], target)

    def merge(rows: pa.Table) -> pa.Table:
        return _merge_rows(rows, target, existing)

    given = ray.data.from_items([{"batch": position} for position in range(len(batches))])
    events = given.repartition(len(batches)).map_batches(load, batch_size=1, batch_format="pyarrow")
    merged = events.repartition(num_blocks, keys=[PARTITION]).map_batches(
        merge, batch_size=None, batch_format="pyarrow"
    )
    exchanged = Exchanged([], [])
    failures = []
    for row in merged.iter_rows():
        report = pickle.loads(row[_REPORT])
        if isinstance(report, MergeReport):
            written.add("events", *report.parts)
            exchanged.merged.append(report)
        elif isinstance(report, LakeError):
            failures.append(report)
        else:
            written.add("quarantine", *(one.quarantine for one in report))
            exchanged.loaded.extend(report)
    if failures:
        raise failures[0]
    return exchanged


def finish_in_order(
    submitted: Iterable[Submitted], finish: Callable[[Submitted], Result]
) -> list[Result]:
    """Results of tasks in their order; a task is submitted when few are under way.

    When one fails, those under way come to their end before its exception is raised, so that it is
    known what they have written.
    """
    limit = _TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    results: list[Result] = []
    under_way: deque[Submitted] = deque()
    try:
        for one in submitted:
            under_way.append(one)
            if len(under_way) >= limit:
                results.append(finish(under_way.popleft()))
        while under_way:
            results.append(finish(under_way.popleft()))
    except BaseException:
        for one in under_way:
            try:
                finish(one)
            except Exception as error:
                log.info("another task has failed too: %s", error)
        raise
    return results


def get(references: Any) -> Any:
    """Results of tasks; what a task raised on purpose is raised here as it was."""
    try:
        return ray.get(references)
    except RayTaskError as error:
        if isinstance(error.cause, LakeError):
            raise error.cause from None
        raise


def _join_small(tasks: Sequence[PartTask]) -> Iterator[list[PartTask]]:
    """Neighbours that together are one task's load."""
    joined: list[PartTask] = []
    weight = 0.0
    for task in tasks:
        if joined and weight + task.part.weight > 1:
            yield joined
            joined, weight = [], 0.0
        joined.append(task)
        weight += task.part.weight
    if joined:
        yield joined


def _load_pieces(
    tasks: Sequence[PartTask], target: Target, num_groups: int
) -> Iterator[pa.Buffer | list[PartReport]]:
    """For each batch of events a piece for each group of buckets; at last the reports of all."""
    edges = group_edges(target.num_buckets, num_groups)
    loaded: list[PartReport] = []
    for reports, events in load_events(tasks, target):
        loaded += reports
        for group in cut_groups(events, edges):
            yield pack(group)
    yield loaded


def _of_buckets(existing: Files, start: int, stop: int) -> Files:
    return {bucket: existing[bucket] for bucket in range(start, stop) if bucket in existing}


def _load_rows(tasks: Sequence[PartTask], target: Target) -> Iterator[pa.Table]:
    """Events, and reports as rows among them; a failure is a report, as Ray Data hands on no more
    than the text of an exception.
    """
    try:
        for reports, events in load_events(tasks, target):
            yield _as_rows(events, target)
            yield _as_row(reports, target)
    except LakeError as error:
        yield _as_row(error, target)


def _merge_rows(rows: pa.Table, target: Target, existing: Files) -> pa.Table:
    is_event = pc.is_null(rows[_REPORT])
    reports = rows[_REPORT].filter(pc.invert(is_event)).to_pylist()
    try:
        merged: Any = merge_events(existing, target, rows.filter(is_event).drop_columns([_REPORT]))
    except LakeError as error:
        merged = error
    return pa.table({_REPORT: pa.array([*reports, pickle.dumps(merged)], pa.binary())})


def _as_rows(events: pa.Table, target: Target) -> pa.Table:
    rows = all_columns(events, target)
    columns = dict(zip(rows.column_names, rows.columns, strict=True))
    nothing = pa.nulls(events.num_rows, pa.binary())
    return pa.table(columns | {PARTITION: events[PARTITION], _REPORT: nothing})


def _as_row(report: list[PartReport] | LakeError, target: Target) -> pa.Table:
    fields = [field for field in target.schema if field.name != PARTITION]
    columns: dict[str, pa.Array] = {field.name: pa.nulls(1, field.type) for field in fields}
    anywhere = pa.array([0], pa.int32())
    content = pa.array([pickle.dumps(report)], pa.binary())
    return pa.table(columns | {PARTITION: anywhere, _REPORT: content})

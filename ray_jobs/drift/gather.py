"""Gathers the counts of drift from the lake and the log of lists: a task for each bucket of users,
which holds the events of that bucket alone. Only counts, and a row an item, reach the driver.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from deltalake import DeltaTable

from data_lake.tables import files_by_bucket, num_buckets_of, open_table, read_table, table_exists
from ray_jobs.config import PipelineConfig
from ray_jobs.drift.axes import Periods
from ray_jobs.drift.counts import count_bucket, count_sessions
from ray_jobs.drift.items import add_items, count_items, learn_items
from ray_jobs.drift.lists import (
    ListsPlan,
    find_files,
    find_score_edges,
    join_sessions,
    split_lists,
)
from ray_jobs.drift.plan import Counts, Plan
from ray_jobs.errors import JobError
from ray_jobs.exchange import finish_in_order, get
from ray_jobs.job import timed
from recsys.artifact import Artifact

_MINUTE_US = 60_000_000
_DAY_US = 1440 * _MINUTE_US


@dataclass(frozen=True)
class Gathered:
    """Counts of all users, and what they are counts of."""

    counts: Counts
    """`[G, S, K]` of each measure that anything was counted for."""
    plan: Plan
    first_event_us: int


@dataclass(frozen=True)
class _Shown:
    """Lists that tasks hold, by bucket; the last bucket is of visitors without a user id."""

    pieces: list[list[Any]]
    sessions: Any
    """Hashes of the sessions of the last bucket, which a task holds too."""
    score_edges: tuple[float, ...]

    def of_bucket(self, number: int) -> list[Any]:
        return [buckets[number] for buckets in self.pieces]


def gather(
    config: PipelineConfig,
    artifact: Artifact,
    events: DeltaTable,
    periods: Periods,
    *,
    events_until_us: int,
    score_edges: tuple[float, ...] = (),
) -> Gathered:
    """Counts both periods.

    Args:
        events_until_us: time of the newest event.
        score_edges: deciles of an earlier run; those of the reference period where there are none.

    Raises: JobError when the reference period has no event; TableError, SourceError.
    """
    buckets = files_by_bucket(events)
    with timed("count items"):
        counted = _count_items(buckets, periods, config.storage.options)
    _refuse_empty_reference(counted, periods)
    items, category_labels = learn_items(
        counted, artifact.catalogue.item_ids, _read_categories(config)
    )
    with timed("sort lists"):
        shown = _sort_lists(config, artifact.version, events, periods)
    monitor = config.monitor
    plan = Plan(
        periods=periods,
        items=items,
        category_labels=category_labels,
        context=artifact.context,
        events_until_us=min(events_until_us, periods.current_until_us),
        attribution_us=round(monitor.attribution_minutes * _MINUTE_US),
        history_us=monitor.history_days * _DAY_US,
        click_types=monitor.click_types,
        score_edges=score_edges or shown.score_edges,
        options=config.storage.options,
    )
    with timed("count"):
        counts = _count(config, buckets, plan, shown)
    return Gathered(counts, plan, int(pc.min(counted["first_us"]).as_py()))


def _count_items(
    buckets: Mapping[int, list[str]], periods: Periods, options: Mapping[str, str]
) -> pa.Table:
    total: list[pa.Table] = []

    def add(reference: Any) -> None:
        total[:] = [add_items([*total, get(reference)])]

    count = ray.remote(count_items)
    finish_in_order((count.remote(files, periods, options) for files in buckets.values()), add)
    if not total:
        raise JobError("The events table is empty; run ray_jobs.ingest first.")
    return total[0]


def _refuse_empty_reference(counted: pa.Table, periods: Periods) -> None:
    if not pc.sum(counted["reference"]).as_py():
        times = periods.describe()
        raise JobError(
            f"There is no event in the reference period, {times['reference_from']} to "
            f"{times['reference_until']}; set monitor.reference_until, or lower monitor.days."
        )


def _read_categories(config: PipelineConfig) -> pa.Table | None:
    lake, options = config.storage.lake_uri, config.storage.options
    if not table_exists(lake, "items", options):
        return None
    return read_table(open_table(lake, "items", options), ["item_id", "category"])


def _sort_lists(
    config: PipelineConfig, version: str, events: DeltaTable, periods: Periods
) -> _Shown:
    plan = ListsPlan(
        periods=periods,
        version=version,
        user_type=pa.schema(events.schema()).field("user_id").type,
        num_buckets=num_buckets_of(events),
        options=config.storage.options,
    )
    split = ray.remote(num_returns=plan.num_buckets + 3)(split_lists)
    files = find_files(config.storage.exposures_uri, periods, plan.options)
    results = [split.remote(some, plan) for some in files]
    samples = get([one[-1] for one in results])
    sessions = ray.remote(join_sessions).remote(*(one[-2] for one in results))
    return _Shown([one[:-2] for one in results], sessions, find_score_edges(samples))


def _count(
    config: PipelineConfig, buckets: Mapping[int, list[str]], plan: Plan, shown: _Shown
) -> Counts:
    lake, options = config.storage.lake_uri, config.storage.options
    has_users = table_exists(lake, "users", options)
    users = files_by_bucket(open_table(lake, "users", options)) if has_users else {}
    total: Counts = {}
    session_events = []

    def add(counts: Any) -> None:
        for name, found in get(counts).items():
            total[name] = found.astype(np.int64) + total.get(name, 0)

    def finish(found: list[Any]) -> None:
        counts, events = found
        add(counts)
        session_events.append(events)

    shared = ray.put(plan)
    count = ray.remote(num_returns=2)(count_bucket)
    counting = (
        count.remote(files, users.get(number, []), shared, shown.sessions, *shown.of_bucket(number))
        for number, files in buckets.items()
    )
    finish_in_order(counting, finish)
    lists = shown.of_bucket(-1)
    add(ray.remote(count_sessions).remote(shared, len(lists), *lists, *session_events))
    return total

"""Lists that were shown and what their visitors did, brought together by visitor: rows of the
exposure log and of the events table go to the same group, where they are joined and added up.

The functions run in tasks, and need no configuration.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_lake.buckets import bucket_of
from data_lake.parquet import read_files
from recsys.attribution import (
    CLICK,
    CONTROL,
    EVENTS,
    LISTS,
    OTHER,
    PURCHASE,
    TREATMENT,
    Tally,
    tally,
)

_SHOWN = ("user_id", "session_id", "timestamp", "model_version", "degraded", "item_ids")
_DONE = ("user_id", "session_id", "item_id", "event_type", "timestamp")


@dataclass(frozen=True)
class Period:
    """What is compared, and when; times are microseconds in UTC."""

    control: str
    treatment: str
    start_us: int
    until_us: int
    """Lists shown before then have their whole window within what the lake knows."""
    end_us: int
    """Lists between `until_us` and then are too young."""
    window_us: int
    before_us: int
    """So long before the start a visitor's activity is looked at."""
    clicks: tuple[str, ...]
    """Types of events."""
    purchases: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict)


def first_shown(files: Sequence[str], version: str, options: dict[str, str]) -> int | None:
    """When a version first gave a list, microseconds in UTC; None if it gave none."""
    rows = read_files(files, ["timestamp", "model_version"], options)
    times = rows["timestamp"].filter(pc.equal(rows["model_version"], version))
    first: int | None = pc.min(times.cast(pa.int64())).as_py()
    return first


def load_lists(
    files: Sequence[str], period: Period, num_groups: int
) -> tuple[pa.Table | Counter[str], ...]:
    """The lists of both versions, `LISTS`, a table a group of visitors; at last the counts of those
    that were left out, and of those of sessions.
    """
    rows = read_files(files, _SHOWN, period.options)
    times_N = rows["timestamp"].cast(pa.int64()).to_numpy()
    rows = rows.filter(pa.array((times_N >= period.start_us) & (times_N < period.end_us)))
    versions = pa.array([period.control, period.treatment])
    of_both = rows.filter(pc.is_in(rows["model_version"], versions))
    visitors = _visitors_of(of_both)
    is_named = pc.is_valid(visitors)
    is_over = pc.less(of_both["timestamp"].cast(pa.int64()), period.until_us)
    counts = Counter(
        of_other_versions=rows.num_rows - of_both.num_rows,
        without_visitor=_count(pc.invert(is_named)),
        too_young=_count(pc.and_(is_named, pc.invert(is_over))),
        of_sessions=_count(pc.and_(is_named, pc.is_null(of_both["user_id"]))),
    )
    arms = pc.index_in(of_both["model_version"], versions).cast(pa.int8())
    assert (CONTROL, TREATMENT) == (0, 1)  # places in `versions`
    columns = [visitors, arms, of_both["timestamp"], of_both["degraded"], of_both["item_ids"]]
    lists = pa.Table.from_arrays(columns, schema=LISTS).filter(pc.and_(is_named, is_over))
    return (*_split(lists, num_groups), counts)


def load_events(
    files: Sequence[str], period: Period, num_groups: int, *, with_sessions: bool
) -> tuple[pa.Table | int, ...]:
    """What visitors did, `EVENTS`, a table a group; at last the number of events.

    Args:
        with_sessions: an event counts for its session too, not only for its user.
    """
    rows = read_files(files, _DONE, period.options)
    times_E = rows["timestamp"].cast(pa.int64()).to_numpy()
    is_before_E = (times_E >= period.start_us - period.before_us) & (times_E < period.start_us)
    kinds_E = _kinds_of(rows["event_type"], period)
    is_after_E = (times_E >= period.start_us) & (times_E < period.until_us + period.window_us)
    is_kept_E = is_before_E | (is_after_E & (kinds_E != OTHER))
    kept = rows.append_column("kind", pa.array(kinds_E)).filter(pa.array(is_kept_E))

    owners = [_named("user", kept["user_id"])]
    if with_sessions:
        owners.append(_named("session", kept["session_id"]))
    events = pa.concat_tables([_events_of(kept, owner) for owner in owners])
    return (*_split(events, num_groups), kept.num_rows)


def tally_group(period: Period, num_lists: int, *pieces: pa.Table) -> Tally:
    """Adds up one group of visitors: the first `num_lists` pieces are lists, the others events."""
    lists = pa.concat_tables(pieces[:num_lists])
    events = pa.concat_tables([EVENTS.empty_table(), *pieces[num_lists:]])
    return tally(lists, events, start_us=period.start_us, window_us=period.window_us)


def _visitors_of(shown: pa.Table) -> pa.ChunkedArray:
    """The name by which a version was chosen; null where it was chosen by chance."""
    return pc.coalesce(_named("user", shown["user_id"]), _named("session", shown["session_id"]))


def _named(kind: str, ids: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(kind, ids.cast(pa.string()), " ")


def _kinds_of(types: pa.ChunkedArray, period: Period) -> np.ndarray:
    is_click, is_purchase = (
        pc.is_in(types, pa.array(names, pa.string())).to_numpy()
        for names in (period.clicks, period.purchases)
    )
    kinds_E = np.where(is_click, CLICK, np.where(is_purchase, PURCHASE, OTHER))
    return kinds_E.astype(np.int8)


def _events_of(rows: pa.Table, visitors: pa.ChunkedArray) -> pa.Table:
    items = rows["item_id"].cast(pa.string())
    columns = [visitors, items, rows["timestamp"], rows["kind"]]
    return pa.Table.from_arrays(columns, schema=EVENTS).filter(pc.is_valid(visitors))


def _split(rows: pa.Table, num_groups: int) -> list[pa.Table]:
    """Rows by the hash of their visitor, a table a group."""
    groups = bucket_of(rows["visitor"], num_groups)
    return [rows.filter(pa.array(groups == group)) for group in range(num_groups)]


def _count(marks: pa.ChunkedArray) -> int:
    return int(pc.sum(marks).as_py() or 0)

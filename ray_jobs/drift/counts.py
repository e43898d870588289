"""What the users of one bucket did and were shown, as counts of each measure of drift: what a task
of `monitor` runs.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_lake.parquet import read_files
from ray_jobs.drift.answers import count_answers, count_lists
from ray_jobs.drift.items import microseconds, value_codes
from ray_jobs.drift.plan import HISTORY_EDGES, Counts, Plan, UserTimes, Visits
from recsys.context import ContextConfig

_OF_EVENTS = ("user_id", "item_id", "timestamp", "event_type")


def count_bucket(
    events: Sequence[str], users: Sequence[str], plan: Plan, *pieces: pa.Table
) -> Counts:
    """All counts of one bucket.

    Args:
        events, users: files of the bucket.
        pieces: lists that its users were shown, as `drift.lists.split_lists` gives them.
    """
    visits = read_visits(events, plan)
    counts = _count_visits(visits, users, plan)
    shown = pa.concat_tables(pieces) if pieces else None
    if shown is not None and shown.num_rows:
        counts |= count_lists(shown, plan) | count_answers(shown, visits, plan)
    return counts


def count_unowned(plan: Plan, *pieces: pa.Table) -> Counts:
    """Counts of lists whose visitors are known by no user id: nobody's events answer them."""
    shown = pa.concat_tables(pieces) if pieces else None
    return count_lists(shown, plan) if shown is not None and shown.num_rows else {}


def read_visits(files: Sequence[str], plan: Plan) -> Visits:
    """The events of a bucket that either period needs, histories before them included."""
    names = [name for name in plan.context.config.categorical if name != "segment"]
    columns = list(dict.fromkeys((*_OF_EVENTS, *names)))
    rows = read_files(files, columns, plan.options, dictionary=["event_type", *names])
    times_us = microseconds(rows["timestamp"])
    is_needed = times_us >= plan.periods.first_us - plan.history_us
    is_needed &= times_us < plan.periods.current_until_us
    rows, times_us = rows.filter(pa.array(is_needed)), times_us[is_needed]

    users = rows["user_id"].combine_chunks().dictionary_encode()
    codes = users.indices.to_numpy()
    order = np.lexsort((times_us, codes))
    rows = rows.take(pa.array(order))
    items_N = plan.items.find(rows["item_id"].combine_chunks())
    assert (items_N >= 0).all(), "items were counted in the same files before"
    return Visits(
        users.dictionary,
        codes[order].astype(np.int64),
        times_us[order],
        items_N,
        {name: rows[name].combine_chunks().cast(pa.string()) for name in ("event_type", *names)},
    )


def _count_visits(visits: Visits, users: Sequence[str], plan: Plan) -> Counts:
    groups, slots, items = visits.groups_N, plan.periods.slot_of(visits.times_us_N), plan.items
    codes = {
        "popularity": items.popularity_HI[1 - groups % 2, visits.items_N],
        "items": items.groups_I[visits.items_N],
        "unknown_items": _is_unknown(visits, slots, plan),
        "context_hour": _hours(visits.times_us_N, plan.context.config),
        "history_length": np.searchsorted(
            HISTORY_EDGES, _history_lengths(visits, plan.history_us), side="right"
        ),
    }
    if plan.category_labels:
        codes["categories"] = items.categories_I[visits.items_N]
    for name in plan.context.config.categorical:
        values = _segments(visits, users, plan) if name == "segment" else visits.columns[name]
        codes[f"context_{name}"] = value_codes(values, plan.labels_of(name))
    return {name: plan.tally(name, groups, slots, found) for name, found in codes.items()}


def _is_unknown(visits: Visits, slots_N: np.ndarray, plan: Plan) -> np.ndarray:
    """Whether the version that serves does not know the item; in the reference period, whether one
    trained just before the window could not have.
    """
    first_us, is_known = plan.items.first_us_I[visits.items_N], plan.items.is_known_I
    is_current = slots_N == plan.periods.num_slots - 1
    was_unseen = first_us >= plan.periods.window_start_us(slots_N)
    is_unknown_N: np.ndarray = ~is_known[visits.items_N] | (~is_current & was_unseen)
    return is_unknown_N


def _history_lengths(visits: Visits, history_us: int) -> np.ndarray:
    """Events of the same user in the time `history_us` before each event."""
    keys = UserTimes.of(visits, history_us)
    return np.arange(len(keys.keys_N)) - np.searchsorted(
        keys.keys_N, keys.keys_N - history_us // 1000, side="left"
    )


def _segments(visits: Visits, files: Sequence[str], plan: Plan) -> pa.Array:
    if not files:
        return pa.nulls(len(visits.users_N), pa.string())
    users = read_files(files, ("user_id", "segment"), plan.options)
    row = pc.index_in(visits.user_ids, users["user_id"].combine_chunks())
    segments = users["segment"].combine_chunks().cast(pa.string()).take(row)
    return segments.take(pa.array(visits.users_N))


def _hours(times_us: np.ndarray, config: ContextConfig) -> np.ndarray:
    local = pa.array(times_us, pa.timestamp("us", tz=config.timezone))
    return np.asarray(pc.hour(local).to_numpy(zero_copy_only=False), np.int64)

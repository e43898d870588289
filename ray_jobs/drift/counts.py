"""What the users of one bucket did and were shown, as counts of each measure of drift: what a task
of `monitor` runs.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_lake.buckets import hash_ids
from data_lake.parquet import read_files
from ray_jobs.drift.answers import count_answers, count_lists
from ray_jobs.drift.items import microseconds, value_codes
from ray_jobs.drift.plan import HISTORY_EDGES, Counts, Plan, VisitorTimes, Visits
from recsys.context import ContextConfig

_OF_EVENTS = ("user_id", "item_id", "timestamp", "event_type")
SESSION_EVENTS = pa.schema(
    [
        ("session_id", pa.string()),
        ("time_us", pa.int64()),
        ("item", pa.int64()),
        ("event_type", pa.string()),
    ]
)
"""Events of sessions that lists were shown to; `item` is a row of `ItemFacts`."""


def count_bucket(
    events: Sequence[str],
    users: Sequence[str],
    plan: Plan,
    sessions: np.ndarray,
    *pieces: pa.Table,
) -> tuple[Counts, pa.Table]:
    """All counts of one bucket, and its events of the given sessions, `SESSION_EVENTS`.

    Args:
        events, users: files of the bucket.
        sessions: hashes, ascending, as `lists.join_sessions` gives them.
        pieces: lists that its users were shown, as `lists.split_lists` gives them.
    """
    visits = read_visits(events, plan, with_sessions=len(sessions) > 0)
    counts = _count_visits(visits, users, plan)
    shown = pa.concat_tables(pieces) if pieces else None
    if shown is not None and shown.num_rows:
        counts |= count_lists(shown, plan) | count_answers(shown, visits, plan)
    return counts, _find_session_events(visits, sessions, plan)


def count_sessions(plan: Plan, num_lists: int, *pieces: pa.Table) -> Counts:
    """Counts of lists whose visitors are known by no user id.

    Events of their sessions answer them where the lake has any. A session without one is left out
    of the answers: events of visitors who never told a user id do not reach the lake, and nobody
    knows whether they followed.

    Args:
        pieces: first `num_lists` tables of lists, as `lists.split_lists` gives them, then
            `SESSION_EVENTS` of all buckets.
    """
    if not num_lists:
        return {}
    shown, events = (
        pa.concat_tables(some).combine_chunks() for some in (pieces[:num_lists], pieces[num_lists:])
    )
    counts = count_lists(shown, plan)
    sessions, times_us, items, types = (events[name] for name in SESSION_EVENTS.names)
    visits = Visits.sort(
        "session_id",
        sessions.combine_chunks(),
        times_us.to_numpy(),
        items.to_numpy(),
        {"event_type": types.combine_chunks()},
    )
    is_known = pc.is_in(shown["session_id"], visits.visitor_ids)
    known = shown.filter(is_known)
    return counts | count_answers(known, visits, plan) if known.num_rows else counts


def read_visits(files: Sequence[str], plan: Plan, *, with_sessions: bool = False) -> Visits:
    """The events of a bucket that either period needs, histories before them included."""
    names = [name for name in plan.context.config.categorical if name != "segment"]
    kept = dict.fromkeys(("event_type", *names, *(("session_id",) if with_sessions else ())))
    columns = list(dict.fromkeys((*_OF_EVENTS, *kept)))
    rows = read_files(files, columns, plan.options, dictionary=["event_type", *names])
    times_us = microseconds(rows["timestamp"])
    is_needed = times_us >= plan.periods.first_us - plan.history_us
    is_needed &= times_us < plan.periods.current_until_us
    rows, times_us = rows.filter(pa.array(is_needed)), times_us[is_needed]

    items_N = plan.items.find(rows["item_id"].combine_chunks())
    assert (items_N >= 0).all(), "items were counted in the same files before"
    return Visits.sort(
        "user_id",
        rows["user_id"].combine_chunks(),
        times_us,
        items_N,
        {name: rows[name].combine_chunks().cast(pa.string()) for name in kept},
    )


def _find_session_events(visits: Visits, sessions: np.ndarray, plan: Plan) -> pa.Table:
    if not len(sessions):
        return SESSION_EVENTS.empty_table()
    ids = visits.columns["session_id"]
    columns = [ids, visits.times_us_N, visits.items_N, visits.columns["event_type"]]
    is_needed = pc.and_(pc.is_valid(ids), pa.array(visits.times_us_N >= plan.periods.first_us))
    events = pa.table(columns, schema=SESSION_EVENTS).filter(is_needed)
    hashes = hash_ids(events["session_id"])
    place = np.minimum(np.searchsorted(sessions, hashes), len(sessions) - 1)
    return events.filter(pa.array(sessions[place] == hashes))


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
    keys = VisitorTimes.of(visits, history_us)
    return np.arange(len(keys.keys_N)) - np.searchsorted(
        keys.keys_N, keys.keys_N - history_us // 1000, side="left"
    )


def _segments(visits: Visits, files: Sequence[str], plan: Plan) -> pa.Array:
    if not files:
        return pa.nulls(len(visits.visitors_N), pa.string())
    users = read_files(files, ("user_id", "segment"), plan.options)
    row = pc.index_in(visits.visitor_ids, users["user_id"].combine_chunks())
    segments = users["segment"].combine_chunks().cast(pa.string()).take(row)
    return segments.take(pa.array(visits.visitors_N))


def _hours(times_us: np.ndarray, config: ContextConfig) -> np.ndarray:
    local = pa.array(times_us, pa.timestamp("us", tz=config.timezone))
    return np.asarray(pc.hour(local).to_numpy(zero_copy_only=False), np.int64)

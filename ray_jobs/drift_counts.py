"""What the users of one bucket did and were shown, as counts of each measure of drift: what a task
of `monitor` runs.

Counts are `[G, S, K]`: groups of users, slots of time (each day of the reference period, and the
whole current period as the last one), and what is counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_lake.parquet import read_files
from ray_jobs.drift_axes import NUM_GROUPS, Periods, group_of
from ray_jobs.drift_items import (
    MISSING,
    NUM_ITEM_GROUPS,
    OTHER,
    ItemFacts,
    microseconds,
    parse_ids,
    value_codes,
)
from recsys.context import ContextConfig, ContextEncoder
from recsys.drift import POPULARITY_LABELS, Measure

MAX_VALUES = 30
"""Values of a context field that have a count of their own."""
HISTORY_EDGES = (1, 2, 5, 10, 20, 50)
HISTORY_LABELS = ("0", "1", "2-4", "5-9", "10-19", "20-49", "50+")
LIVE_MEASURES = ("live_hit_rate", "live_click_through", "coverage", "scores")
"""Those that need the log of lists."""
_HIT_LIST = 10
_OF_EVENTS = ("user_id", "item_id", "timestamp", "event_type")

Counts = dict[str, np.ndarray]


@dataclass(frozen=True)
class Plan:
    """What all buckets of one run have in common."""

    periods: Periods
    items: ItemFacts
    category_labels: tuple[str, ...]
    context: ContextEncoder
    events_until_us: int
    """Until when events are known: later lists cannot be judged."""
    attribution_us: int
    history_us: int
    click_types: tuple[str, ...]
    """Event types that count as a click; all where empty."""
    score_edges: tuple[float, ...]
    """Deciles of the reference period; empty without scores."""
    options: Mapping[str, str]

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """All measures that the plan allows, by name."""
        shares = {
            "popularity": POPULARITY_LABELS,
            "items": tuple(f"group {number}" for number in range(NUM_ITEM_GROUPS)),
            "categories": self.category_labels,
            **{f"context_{name}": self.labels_of(name) for name in self.context.config.categorical},
            "context_hour": tuple(f"{hour:02}" for hour in range(24)),
            "history_length": HISTORY_LABELS,
            "scores": tuple(f"above {edge:.4g}" for edge in (-np.inf, *self.score_edges)),
        }
        if not self.category_labels:
            del shares["categories"]
        num_covered = int(self.items.covered_I.max(initial=-1)) + 1
        covered = ("lists", *(f"item {number}" for number in range(num_covered)))
        found = [Measure(name, "shares", labels) for name, labels in shares.items()]
        found += [
            Measure("unknown_items", "rise", ("known", "unknown")),
            Measure("live_hit_rate", "fall", ("miss", "hit")),
            Measure("live_click_through", "fall", ("no click", "click")),
            Measure("coverage", "coverage", covered),
        ]
        return {measure.name: measure for measure in found}

    def labels_of(self, field: str) -> tuple[str, ...]:
        """What is counted of a context field: the values that the model knows, the most frequent
        ones by themselves; what it does not know counts as OTHER.
        """
        return (*self.context.vocabularies[field][:MAX_VALUES], OTHER, MISSING)

    def tally(
        self, name: str, groups_N: np.ndarray, slots_N: np.ndarray, codes_N: np.ndarray
    ) -> np.ndarray:
        """Counts of codes, int32 `[G, S, K]`; rows outside of both periods are left out."""
        num_slots, num_codes = self.periods.num_slots, len(self.measures[name].labels)
        is_in = slots_N >= 0
        cells = (groups_N * num_slots + slots_N) * num_codes + codes_N
        counts = np.bincount(cells[is_in], minlength=NUM_GROUPS * num_slots * num_codes)
        return counts.reshape(NUM_GROUPS, num_slots, num_codes).astype(np.int32)


@dataclass(frozen=True)
class Visits:
    """The events of whole users, N of U users, by user and time."""

    user_ids: pa.Array
    """`[U]`"""
    users_N: np.ndarray
    times_us_N: np.ndarray
    items_N: np.ndarray
    """Rows of `ItemFacts`."""
    columns: Mapping[str, pa.Array]
    """Text of each context column, `[N]`."""

    @property
    def groups_N(self) -> np.ndarray:
        groups_N: np.ndarray = group_of(self.user_ids)[self.users_N]
        return groups_N


def count_bucket(
    events: Sequence[str], users: Sequence[str], plan: Plan, *pieces: pa.Table
) -> Counts:
    """All counts of one bucket.

    Args:
        events, users: files of the bucket.
        pieces: lists that its users were shown, as `drift_lists.split_lists` gives them.
    """
    visits = read_visits(events, plan)
    counts = _count_visits(visits, users, plan)
    shown = pa.concat_tables(pieces) if pieces else None
    if shown is not None and shown.num_rows:
        counts |= count_lists(shown, plan) | _count_answers(shown, visits, plan)
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


def count_lists(shown: pa.Table, plan: Plan) -> Counts:
    """Coverage and scores of lists."""
    groups, slots = shown["group"].to_numpy(), plan.periods.slot_of(shown["time_us"].to_numpy())
    row, item, _ = _listed(shown, plan)
    number = np.where(item >= 0, plan.items.covered_I[item], -1)
    is_covered = number >= 0
    listing = row[is_covered]
    counts = {
        "coverage": plan.tally("coverage", groups, slots, np.zeros(len(slots), np.int64))
        + plan.tally("coverage", groups[listing], slots[listing], 1 + number[is_covered])
    }
    if plan.score_edges:
        scores = shown["score"].to_numpy()
        codes = np.searchsorted(plan.score_edges, scores)
        slots = np.where(np.isnan(scores), -1, slots)
        counts["scores"] = plan.tally("scores", groups, slots, codes)
    return counts


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
    keys = _Keys.of(visits, history_us)
    return np.arange(len(keys.keys_N)) - np.searchsorted(
        keys.keys_N, keys.keys_N - history_us // 1000, side="left"
    )


@dataclass(frozen=True)
class _Keys:
    """Users and times as one ascending number, so that a search finds a user's next event."""

    keys_N: np.ndarray
    start_ms: int
    span_ms: int
    """From user to user: more than all of their times and what is searched around them."""

    @classmethod
    def of(cls, visits: Visits, around_us: int) -> "_Keys":
        times_ms = visits.times_us_N // 1000
        start = int(times_ms.min()) if len(times_ms) else 0
        span = int(times_ms.max(initial=start)) - start + around_us // 1000 + 1
        return cls(visits.users_N * span + times_ms - start, start, span)

    def count_until(self, users: np.ndarray, times_us: np.ndarray) -> np.ndarray:
        """Number of events of earlier users, and of these until those times."""
        since_ms = np.clip(times_us // 1000 - self.start_ms, -1, self.span_ms - 1)
        keys = users * self.span_ms + since_ms
        return np.asarray(np.searchsorted(self.keys_N, keys, side="right"), np.int64)


def _count_answers(shown: pa.Table, visits: Visits, plan: Plan) -> Counts:
    """Whether the next event after a list was on one of its first ten items, and whether any event
    within the attribution window was on one of all; a list is judged once the window has passed.
    """
    groups, times_us = shown["group"].to_numpy(), shown["time_us"].to_numpy()
    slots = plan.periods.slot_of(times_us)
    slots = np.where(times_us + plan.attribution_us <= plan.events_until_us, slots, -1)
    first, stop = _answers(shown, visits, plan.attribution_us)
    row, item, rank = _listed(shown, plan)

    has_next = stop > first
    next_item = np.full(len(first), -2)
    next_item[has_next] = visits.items_N[first[has_next]]
    is_hit = _any_of(row, (item == next_item[row]) & (rank < _HIT_LIST), len(first))
    is_clicked = _find_clicked(first, stop, row, item, visits, plan)
    return {
        "live_hit_rate": plan.tally(
            "live_hit_rate", groups, np.where(has_next, slots, -1), is_hit.astype(np.int64)
        ),
        "live_click_through": plan.tally(
            "live_click_through", groups, slots, is_clicked.astype(np.int64)
        ),
    }


def _answers(shown: pa.Table, visits: Visits, attribution_us: int) -> tuple[np.ndarray, np.ndarray]:
    """First event after each list, and the one behind the last within the window; equal without
    any.
    """
    found = pc.index_in(shown["user_id"].combine_chunks(), visits.user_ids)
    users = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    times_us = shown["time_us"].to_numpy()
    keys = _Keys.of(visits, attribution_us)
    first = keys.count_until(users, times_us)
    stop = keys.count_until(users, times_us + attribution_us)
    return np.where(users < 0, 0, first), np.where(users < 0, 0, stop)


def _find_clicked(
    first: np.ndarray,
    stop: np.ndarray,
    row: np.ndarray,
    item: np.ndarray,
    visits: Visits,
    plan: Plan,
) -> np.ndarray:
    counts = stop - first
    answer_row = np.repeat(np.arange(len(first)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    event = first[answer_row] + within
    is_listed = item >= 0
    num_items = len(plan.items.item_ids)
    listed = row[is_listed] * num_items + item[is_listed]
    is_click = np.isin(answer_row * num_items + visits.items_N[event], listed)
    if plan.click_types:
        types = visits.columns["event_type"].take(pa.array(event))
        is_click &= np.asarray(pc.is_in(types, pa.array(plan.click_types)), bool)
    return _any_of(answer_row, is_click, len(first))


def _any_of(rows: np.ndarray, flags: np.ndarray, num_rows: int) -> np.ndarray:
    found: np.ndarray = np.bincount(rows[flags], minlength=num_rows) > 0
    return found


def _listed(shown: pa.Table, plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List, item and rank (from 0) of everything that was shown."""
    lists = shown["item_ids"].combine_chunks()
    lengths = pc.fill_null(lists.value_lengths(), 0).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(lengths)), lengths)
    rank = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    ids = parse_ids(lists.flatten(), plan.items.item_ids.type)
    return row, plan.items.find(ids), rank


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

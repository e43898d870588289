"""Lists that were shown, as counts: what they cover, how they score, what users did next."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.drift.items import parse_ids
from ray_jobs.drift.plan import Counts, Plan, VisitorTimes, Visits

_HIT_LIST = 10


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


def count_answers(shown: pa.Table, visits: Visits, plan: Plan) -> Counts:
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
    found = pc.index_in(shown[visits.known_by].combine_chunks(), visits.visitor_ids)
    visitors = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    times_us = shown["time_us"].to_numpy()
    keys = VisitorTimes.of(visits, attribution_us)
    first = keys.count_until(visitors, times_us)
    stop = keys.count_until(visitors, times_us + attribution_us)
    return np.where(visitors < 0, 0, first), np.where(visitors < 0, 0, stop)


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

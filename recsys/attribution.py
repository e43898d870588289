"""Which list a click or a purchase goes back to, and what each visitor of an experiment did.

Letters: N lists, S items on them, E events, V visitors, C columns of `recsys.experiment`.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.experiment import COLUMNS, Moments

CONTROL, TREATMENT = 0, 1
OTHER, CLICK, PURCHASE = 0, 1, 2
_TIME = pa.timestamp("us", tz="UTC")

LISTS = pa.schema(
    [
        ("visitor", pa.string()),
        ("arm", pa.int8()),
        ("timestamp", _TIME),
        ("degraded", pa.bool_()),
        ("item_ids", pa.list_(pa.string())),
    ]
)
EVENTS = pa.schema(
    [
        ("visitor", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", _TIME),
        ("kind", pa.int8()),
    ]
)


@dataclass(frozen=True)
class Tally:
    """What is known of some visitors; those of others are added to it."""

    control: Moments
    treatment: Moments
    num_switched: int = 0
    """Visitors who saw both versions: they are in neither."""
    last_us: int = 0
    """When the last list was shown."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.control + other.control,
            self.treatment + other.treatment,
            self.num_switched + other.num_switched,
            max(self.last_us, other.last_us),
        )


NOTHING = Tally(Moments.none(), Moments.none())


def tally(lists: pa.Table, events: pa.Table, *, start_us: int, window_us: int) -> Tally:
    """Joins the lists and the events of the same visitors, and adds up each arm.

    Args:
        lists: `LISTS`, all of them that these visitors saw from `start_us` on.
        events: `EVENTS`, in any order; those before `start_us` tell how active a visitor was.
        window_us: microseconds after a list in which a click or a purchase counts for it.
    """
    if lists.num_rows == 0:
        return NOTHING
    visitors_N, visitors_E = _shared_codes(lists["visitor"], events["visitor"])
    num_visitors = max(visitors_N.max(), visitors_E.max(initial=0)) + 1
    arms_N = lists["arm"].to_numpy()
    lists_VA = np.bincount(2 * visitors_N + arms_N, minlength=2 * num_visitors).reshape(-1, 2)
    sees_VA = lists_VA > 0

    lists_E = attribute(lists, events, window_us)
    kinds_E = events["kind"].to_numpy()
    is_clicked_N, is_bought_N = (
        _is_among(lists_E[(kinds_E == kind) & (lists_E >= 0)], lists.num_rows)
        for kind in (CLICK, PURCHASE)
    )
    bought_V = np.bincount(visitors_N, is_bought_N, num_visitors)
    is_before_E = _microseconds(events) < start_us
    columns = {
        "users": np.ones(num_visitors),
        "lists": np.bincount(visitors_N, minlength=num_visitors),
        "clicked_lists": np.bincount(visitors_N, is_clicked_N, num_visitors),
        "bought_lists": bought_V,
        "buyers": bought_V > 0,
        # A few visitors do most: their logarithm says more of what they will do.
        "before": np.log1p(np.bincount(visitors_E[is_before_E], minlength=num_visitors)),
        "degraded_lists": np.bincount(visitors_N, lists["degraded"].to_numpy(), num_visitors),
    }
    values_VC = np.stack([columns[name] for name in COLUMNS], axis=1).astype(np.float64)

    is_switched_V = sees_VA[:, CONTROL] & sees_VA[:, TREATMENT]
    return Tally(
        Moments.of(values_VC[sees_VA[:, CONTROL] & ~is_switched_V]),
        Moments.of(values_VC[sees_VA[:, TREATMENT] & ~is_switched_V]),
        int(is_switched_V.sum()),
        int(_microseconds(lists).max()),
    )


def attribute(lists: pa.Table, events: pa.Table, window_us: int) -> np.ndarray:
    """Row of the list that each event goes back to, int64 `[E]`: the last one before it that showed
    the item to the visitor, at most `window_us` earlier; -1 where there is none.
    """
    item_ids = lists["item_ids"].combine_chunks()
    lengths_N = pc.list_value_length(item_ids).to_numpy(zero_copy_only=False)
    lists_S = np.repeat(np.arange(lists.num_rows), lengths_N)
    visitors_N, visitors_E = _shared_codes(lists["visitor"], events["visitor"])
    items_S, items_E = _shared_codes(pa.chunked_array([item_ids.flatten()]), events["item_id"])

    # Shown items and events in one row: by visitor and item, then by time, a list before a click.
    visitors = np.concatenate([visitors_N[lists_S], visitors_E])
    items = np.concatenate([items_S, items_E])
    times = np.concatenate([_microseconds(lists)[lists_S], _microseconds(events)])
    is_event = np.arange(len(items)) >= len(items_S)
    order = np.lexsort((is_event, times, items, visitors))
    last = np.maximum.accumulate(np.where(is_event[order], -1, np.arange(len(order))))

    shown = order[last]
    is_same = (visitors[shown] == visitors[order]) & (items[shown] == items[order])
    is_found = (last >= 0) & is_same & (times[order] - times[shown] <= window_us) & is_event[order]
    lists_E = np.full(events.num_rows, -1)
    lists_E[order[is_found] - len(items_S)] = lists_S[shown[is_found]]
    return lists_E


def _shared_codes(first: pa.ChunkedArray, second: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Equal numbers for equal texts of two columns."""
    both = pa.chunked_array([*first.chunks, *second.chunks], pa.string())
    codes = both.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    return codes[: len(first)], codes[len(first) :]


def _is_among(rows: np.ndarray, num_rows: int) -> np.ndarray:
    return np.bincount(rows, minlength=num_rows) > 0


def _microseconds(rows: pa.Table) -> np.ndarray:
    times: np.ndarray = rows["timestamp"].cast(pa.int64()).to_numpy()
    return times

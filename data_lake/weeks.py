"""The newest weeks of events beside those before: how many came, on which items, and which item was
looked at after which. From that the figures by which a broken feed is told from a good one.

A week is as long as `Weeks.days` says. Week 0 is the newest; the first `num_new` are new, the
`num_reference` after them are what they are compared with.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_DAY_US = 86_400_000_000
_OUTSIDE = -1
_PRIOR = 50.0
"""Events that the popularity of an item counts as, when what follows an item is estimated."""

COLUMNS = ("user_id", "item_id", "timestamp", "ingested_at", "arrival")
"""Of the events table, which is what is counted."""


@dataclass(frozen=True)
class Weeks:
    """Which weeks are looked at."""

    until_us: int
    """End of the newest one, microseconds since 1970."""
    days: float
    num_new: int
    num_reference: int

    @classmethod
    def ending(cls, until: datetime, days: float, num_new: int, num_reference: int) -> "Weeks":
        """Weeks that end at a moment."""
        return cls(round(until.timestamp() * 1_000_000), days, num_new, num_reference)

    @property
    def num(self) -> int:
        return self.num_new + self.num_reference

    def number(self, times_us: np.ndarray) -> np.ndarray:
        """The week of each time, int64; -1 outside of all of them."""
        week = (self.until_us - 1 - times_us) // round(self.days * _DAY_US)
        return np.where((week >= 0) & (week < self.num), week, _OUTSIDE)


@dataclass(frozen=True)
class Counts:
    """What one bucket of events holds, or all of them together."""

    items: pa.Table
    """week, item_id, count"""
    followers: pa.Table
    """cell, count: how often the second of K leading items came right after the first; the cell is
    `(week * K + first) * K + second`."""


@dataclass(frozen=True)
class WeekFigures:
    """What the gates look at; a figure of each new week stands at its number, the newest first."""

    rows_W: tuple[int, ...]
    """Events of all weeks, new and reference."""
    num_new: int
    unknown_shares: tuple[float, ...]
    """Of events on items that neither the shop's items table nor the weeks before know."""
    divergences: tuple[float, ...]
    """Of the popularity of items from that of the weeks before, bits: 0 the same, 1 no item in
    common."""
    agreements: tuple[float, ...]
    """How much better the next item is foretold by the item before it, with the pairs of the weeks
    before, than by popularity; bits an event."""
    reference_agreement: float | None
    """The same of the newest reference week; None where there are no earlier ones."""


def count_bucket(events: pa.Table, weeks: Weeks, leaders: pa.Array) -> Counts:
    """Counts the events of some users.

    Args:
        events: `COLUMNS` of all events of these users.
        leaders: ids of the K items whose neighbours are counted.
    """
    week_T = weeks.number(events["timestamp"].cast(pa.int64()).to_numpy())
    is_inside = pa.array(week_T != _OUTSIDE)
    events, week_T = events.filter(is_inside), week_T[week_T != _OUTSIDE]
    by_item = pa.table({"week": week_T, "item_id": events["item_id"]}).group_by(["week", "item_id"])
    items = by_item.aggregate([([], "count_all")]).rename_columns(["week", "item_id", "count"])
    return Counts(items, _count_followers(events, week_T, leaders))


def add_counts(parts: Iterable[Counts]) -> Counts:
    """All buckets together."""
    parts = list(parts)
    return Counts(
        _add([part.items for part in parts], ["week", "item_id"]),
        _add([part.followers for part in parts], ["cell"]),
    )


def describe_weeks(counts: Counts, weeks: Weeks, leaders: pa.Array, known: pa.Array) -> WeekFigures:
    """The figures of all weeks.

    Args:
        known: ids of the items that the shop or the serving model knows.
    """
    rows_W = _rows(counts.items, weeks.num)
    reference = _in_weeks(counts.items, range(weeks.num_new, weeks.num))
    popular_K = _popularity(reference, leaders)
    all_known = pa.concat_arrays([known, reference["item_id"].combine_chunks().cast(known.type)])
    new = [_in_weeks(counts.items, [week]) for week in range(weeks.num_new)]
    followers_WKK = _unfold(counts.followers, weeks.num, len(leaders))
    followers_KK = followers_WKK[weeks.num_new :].sum(axis=0)
    return WeekFigures(
        rows_W=tuple(rows_W.tolist()),
        num_new=weeks.num_new,
        unknown_shares=tuple(_unknown_share(week, all_known) for week in new),
        divergences=tuple(divergence(_popularity(week, leaders), popular_K) for week in new),
        agreements=tuple(
            agreement(new_KK, followers_KK) for new_KK in followers_WKK[: weeks.num_new]
        ),
        reference_agreement=_reference_agreement(followers_WKK[weeks.num_new :]),
    )


def divergence(ours_K: np.ndarray, theirs_K: np.ndarray) -> float:
    """Jensen-Shannon divergence of two counts over the same things, bits; 0 where one is empty."""
    if ours_K.sum() == 0 or theirs_K.sum() == 0:
        return 0.0
    ours_K, theirs_K = ours_K / ours_K.sum(), theirs_K / theirs_K.sum()
    middle_K = (ours_K + theirs_K) / 2
    return float((_relative(ours_K, middle_K) + _relative(theirs_K, middle_K)) / 2)


def agreement(new_KK: np.ndarray, reference_KK: np.ndarray) -> float:
    """Mean gain, in bits, of foretelling the followers of `new_KK` by those of `reference_KK`
    instead of by popularity alone; 0 where either is empty, below 0 where pairs mislead.
    """
    if new_KK.sum() == 0 or reference_KK.sum() == 0:
        return 0.0
    popularity_K = (reference_KK.sum(axis=0) + 1) / (reference_KK.sum() + len(reference_KK))
    smoothed_KK = reference_KK + _PRIOR * popularity_K
    chance_KK = smoothed_KK / (reference_KK.sum(axis=1, keepdims=True) + _PRIOR)
    gain_KK = np.log2(chance_KK / popularity_K)
    return float((new_KK * gain_KK).sum() / new_KK.sum())


def _count_followers(events: pa.Table, week_T: np.ndarray, leaders: pa.Array) -> pa.Table:
    K = len(leaders)
    codes = pc.fill_null(pc.index_in(events["item_id"].cast(leaders.type), leaders), -1)
    item_T = codes.to_numpy()
    user_T = events["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    times = (events[name].cast(pa.int64()).to_numpy() for name in reversed(COLUMNS[2:]))
    order = np.lexsort((*times, user_T))
    item_T, user_T, week_T = item_T[order], user_T[order], week_T[order]
    is_pair = (user_T[1:] == user_T[:-1]) & (item_T[1:] != item_T[:-1])
    is_pair &= (item_T[1:] >= 0) & (item_T[:-1] >= 0)
    cells = (week_T[1:] * K + item_T[:-1]) * K + item_T[1:]
    cells, counts = np.unique(cells[is_pair], return_counts=True)
    return pa.table({"cell": cells, "count": counts})


def _add(tables: list[pa.Table], keys: list[str]) -> pa.Table:
    added = pa.concat_tables(tables).group_by(keys).aggregate([("count", "sum")])
    return added.rename_columns([*keys, "count"])


def _unfold(followers: pa.Table, num_weeks: int, K: int) -> np.ndarray:
    unfolded = np.zeros(num_weeks * K * K, np.int64)
    unfolded[followers["cell"].to_numpy()] = followers["count"].to_numpy()
    return unfolded.reshape(num_weeks, K, K)


def _rows(items: pa.Table, num_weeks: int) -> np.ndarray:
    week, count = items["week"].to_numpy(), items["count"].to_numpy()
    return np.bincount(week, weights=count, minlength=num_weeks).astype(np.int64)


def _in_weeks(items: pa.Table, weeks: Iterable[int]) -> pa.Table:
    wanted = pa.array(list(weeks), pa.int64())
    return items.filter(pc.is_in(items["week"], wanted))


def _popularity(items: pa.Table, leaders: pa.Array) -> np.ndarray:
    """Events on each leading item, and on all others together: `[K + 1]`."""
    codes = pc.index_in(items["item_id"].cast(leaders.type), leaders)
    places = pc.fill_null(codes, len(leaders)).to_numpy()
    return np.bincount(places, weights=items["count"].to_numpy(), minlength=len(leaders) + 1)


def _unknown_share(items: pa.Table, known: pa.Array) -> float:
    total = pc.sum(items["count"]).as_py() or 0
    unknown = items.filter(pc.invert(pc.is_in(items["item_id"].cast(known.type), known)))
    return (pc.sum(unknown["count"]).as_py() or 0) / total if total else 0.0


def _reference_agreement(followers_WKK: np.ndarray) -> float | None:
    newest_KK, earlier_KK = followers_WKK[0], followers_WKK[1:].sum(axis=0)
    if newest_KK.sum() == 0 or earlier_KK.sum() == 0:
        return None
    return agreement(newest_KK, earlier_KK)


def _relative(ours_K: np.ndarray, theirs_K: np.ndarray) -> float:
    there_K = ours_K > 0
    return float((ours_K[there_K] * np.log2(ours_K[there_K] / theirs_K[there_K])).sum())

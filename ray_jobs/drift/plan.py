"""What tasks of the monitor share: the plan of a run with its measures, and visitors' events in the
order in which they are looked at.

Counts are `[G, S, K]`: groups of users, slots of time (each day of the reference period, and the
whole current period as the last one), and what is counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa

from ray_jobs.drift.axes import NUM_GROUPS, Periods, group_of
from ray_jobs.drift.items import MISSING, NUM_ITEM_GROUPS, OTHER, ItemFacts
from recsys.context import ContextEncoder
from recsys.drift import POPULARITY_LABELS, Measure

MAX_VALUES = 30
"""Values of a context field that have a count of their own."""
HISTORY_EDGES = (1, 2, 5, 10, 20, 50)
HISTORY_LABELS = ("0", "1", "2-4", "5-9", "10-19", "20-49", "50+")
LIVE_MEASURES = ("live_hit_rate", "live_click_through", "coverage", "scores")
"""Those that need the log of lists."""

Counts = dict[str, np.ndarray]
KnownBy = Literal["user_id", "session_id"]
"""What a visitor's lists and events have in common."""


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
    """The events of whole visitors, N of U visitors, by visitor and time."""

    known_by: KnownBy
    visitor_ids: pa.Array
    """`[U]`"""
    visitors_N: np.ndarray
    times_us_N: np.ndarray
    items_N: np.ndarray
    """Rows of `ItemFacts`."""
    columns: Mapping[str, pa.Array]
    """Text of each context column, `[N]`."""

    @classmethod
    def sort(
        cls,
        known_by: KnownBy,
        ids_N: pa.Array,
        times_us_N: np.ndarray,
        items_N: np.ndarray,
        columns: Mapping[str, pa.Array],
    ) -> "Visits":
        """Of events in any order; none lacks the id of its visitor."""
        visitors = ids_N.dictionary_encode()
        codes_N = visitors.indices.to_numpy()
        order_N = np.lexsort((times_us_N, codes_N))
        return cls(
            known_by,
            visitors.dictionary,
            codes_N[order_N].astype(np.int64),
            times_us_N[order_N],
            items_N[order_N],
            {name: column.take(pa.array(order_N)) for name, column in columns.items()},
        )

    @property
    def groups_N(self) -> np.ndarray:
        groups_N: np.ndarray = group_of(self.visitor_ids)[self.visitors_N]
        return groups_N


@dataclass(frozen=True)
class VisitorTimes:
    """Visitors and times as one ascending number, so that a search finds a visitor's next event."""

    keys_N: np.ndarray
    start_ms: int
    span_ms: int
    """From visitor to visitor: more than all of their times and what is searched around them."""

    @classmethod
    def of(cls, visits: Visits, around_us: int) -> "VisitorTimes":
        times_ms = visits.times_us_N // 1000
        start = int(times_ms.min()) if len(times_ms) else 0
        span = int(times_ms.max(initial=start)) - start + around_us // 1000 + 1
        return cls(visits.visitors_N * span + times_ms - start, start, span)

    def count_until(self, visitors: np.ndarray, times_us: np.ndarray) -> np.ndarray:
        """Number of events of earlier visitors, and of these until those times."""
        since_ms = np.clip(times_us // 1000 - self.start_ms, -1, self.span_ms - 1)
        keys = visitors * self.span_ms + since_ms
        return np.asarray(np.searchsorted(self.keys_N, keys, side="right"), np.int64)

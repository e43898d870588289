"""Which events stay in a sequence: rules over flat arrays, each of them counted.

Events come sorted by user and then by time, so that every user, and every run of one item, is a
slice.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from data_lake.ordering import Ints, run_starts

Mask = NDArray[np.bool_]

_DAY_US = 86_400_000_000


class CleaningConfig(BaseModel):
    """The rules, in the order in which they are applied; None or 1 switches a limit off."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    event_types: tuple[str, ...] | None = None
    """Types that count as an interaction; None keeps all."""
    max_events_per_user: int | None = Field(default=None, ge=1)
    """A user with more events than this is taken for a bot and left out altogether."""
    max_events_per_day: int | None = Field(default=None, ge=1)
    """The same for a single day (UTC). Leave it off for logs that record a past in one sitting."""
    min_item_events: int = Field(default=1, ge=1)
    """Events of a kept type that an item needs in the whole table."""
    core_passes: int = Field(default=1, ge=1)
    """How often items are counted, from the second time on without the events of users who fall
    below min_user_events; it ends early once nothing changes, which is the k-core."""
    drop_repeats: bool = True
    """A run of one item becomes one position: time and device of its first event, last type."""
    min_user_events: int = Field(default=2, ge=1)
    """Positions that a user needs after all of the above."""
    max_length: int | None = Field(default=None, ge=1)
    """The most recent positions that are kept of a user."""


@dataclass(frozen=True)
class FlatEvents:
    """E events as arrays `[E]`, sorted by user, then time; ids, types and contexts are codes."""

    user: Ints
    item: Ints
    event_type: Ints
    timestamp_us: Ints
    context: Mapping[str, Ints]
    """What no rule looks at: the device, and columns of the shop's own."""

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: Ints | Mask) -> "FlatEvents":
        """The given rows, by index or mask; an ascending index keeps the order."""
        if rows.dtype == bool and rows.all():
            return self  # most rules remove nothing, and copies of a bucket are not free
        return FlatEvents(
            self.user[rows],
            self.item[rows],
            self.event_type[rows],
            self.timestamp_us[rows],
            {name: codes[rows] for name, codes in self.context.items()},
        )


def clean(
    events: FlatEvents,
    config: CleaningConfig,
    *,
    wrong_type: Mask | None = None,
    rare_item: Mask | None = None,
) -> tuple[FlatEvents, Counter[str]]:
    """Applies every rule in turn and counts the events that each of them removed.

    The masks `[E]` mark events of a type that is not kept and of an item that is too rare: both
    need names or counts that are not in the codes. Counts of users are under `users_...`.
    """
    counts = Counter(events_read=len(events), users_read=num_users(events))
    if wrong_type is not None:
        counts["removed_event_type"] = int(wrong_type.sum())
        events = events.take(~wrong_type)
        rare_item = None if rare_item is None else rare_item[~wrong_type]

    bots = is_bot(events, config)
    counts["removed_bots"], counts["users_bots"] = int(bots.sum()), num_users(events, bots)
    unwanted = bots if rare_item is None else bots | rare_item
    counts["removed_rare_items"] = int(unwanted.sum()) - counts["removed_bots"]
    events = events.take(~unwanted)

    if config.drop_repeats:
        collapsed = collapse_repeats(events)
        counts["removed_repeats"] = len(events) - len(collapsed)
        events = collapsed

    short = is_short(events, config)
    counts["removed_short_users"] = int(short.sum())
    counts["users_short"] = num_users(events, short)
    events = events.take(~short)

    recent = _is_recent(events, config.max_length)
    counts["removed_over_length"] = len(events) - int(recent.sum())
    events = events.take(recent)
    counts["events_kept"], counts["users_kept"] = len(events), num_users(events)
    return events, counts


def user_offsets(user: Ints) -> NDArray[np.int64]:
    """Where each user begins, and the number of events at the end: shape `[users + 1]`."""
    return np.append(run_starts(user), len(user))


def num_users(events: FlatEvents, chosen: Mask | None = None) -> int:
    """How many users the events, or the chosen ones of them, belong to."""
    user = events.user if chosen is None else events.user[chosen]
    return len(run_starts(user))


def is_bot(events: FlatEvents, config: CleaningConfig) -> Mask:
    """Events of users that have more events, in all or on one day (UTC), than a person has."""
    if config.max_events_per_user is None and config.max_events_per_day is None:
        return np.zeros(len(events), bool)
    offsets = user_offsets(events.user)
    bots = np.zeros(len(offsets) - 1, bool)
    if config.max_events_per_user is not None:
        bots |= np.diff(offsets) > config.max_events_per_user
    if config.max_events_per_day is not None:
        days = run_starts(events.user, events.timestamp_us // _DAY_US)
        crowded = days[np.diff(days, append=len(events)) > config.max_events_per_day]
        bots[np.searchsorted(offsets, crowded, side="right") - 1] = True
    return np.repeat(bots, np.diff(offsets))


def collapse_repeats(events: FlatEvents) -> FlatEvents:
    """Keeps the first event of each run of one item, with the event type of the run's last."""
    first = run_starts(events.user, events.item)
    if len(first) == len(events):
        return events
    last = np.append(first[1:], len(events)) - 1
    kept = events.take(first)
    event_type = events.event_type[last[: len(first)]]
    return FlatEvents(kept.user, kept.item, event_type, kept.timestamp_us, kept.context)


def is_short(events: FlatEvents, config: CleaningConfig) -> Mask:
    """Events of users who have fewer than they need."""
    if config.min_user_events <= 1:
        return np.zeros(len(events), bool)
    lengths = np.diff(user_offsets(events.user))
    return np.repeat(lengths < config.min_user_events, lengths)


def _is_recent(events: FlatEvents, max_length: int | None) -> Mask:
    if max_length is None:
        return np.ones(len(events), bool)
    offsets = user_offsets(events.user)
    after = np.repeat(offsets[1:], np.diff(offsets)) - np.arange(len(events))
    return after <= max_length

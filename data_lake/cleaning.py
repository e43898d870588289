"""Which events stay in a sequence: rules over flat arrays, each of them counted.

Events come sorted by user and then by time, so that every user, and every run of one item, is a
slice.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Ints = NDArray[np.integer[Any]]
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
    """Events of a kept type that an item needs in the whole table; one pass, no k-core."""
    drop_repeats: bool = True
    """A run of one item becomes one position: time and device of its first event, last type."""
    min_user_events: int = Field(default=2, ge=1)
    """Positions that a user needs after all of the above."""
    max_length: int | None = Field(default=None, ge=1)
    """The most recent positions that are kept of a user."""


@dataclass(frozen=True)
class FlatEvents:
    """E events as arrays `[E]`, sorted by user, then time; ids, types and devices are codes."""

    user: Ints
    item: Ints
    event_type: Ints
    timestamp_us: Ints
    device: Ints

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: Ints | Mask) -> "FlatEvents":
        """The given rows, by index or mask; an ascending index keeps the order."""
        if rows.dtype == bool and rows.all():
            return self  # most rules remove nothing, and six copies of a bucket are not free
        return FlatEvents(
            self.user[rows],
            self.item[rows],
            self.event_type[rows],
            self.timestamp_us[rows],
            self.device[rows],
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
    counts = Counter(events_read=len(events), users_read=_num_users(events))
    if rare_item is None:
        rare_item = np.zeros(len(events), bool)
    if wrong_type is not None:
        counts["removed_event_type"] = int(wrong_type.sum())
        events, rare_item = events.take(~wrong_type), rare_item[~wrong_type]

    bots = is_bot(events, config)
    counts["removed_bots"], counts["users_bots"] = int(bots.sum()), _num_users(events.take(bots))
    counts["removed_rare_items"] = int((rare_item & ~bots).sum())
    events = events.take(~bots & ~rare_item)

    if config.drop_repeats:
        collapsed = collapse_repeats(events)
        counts["removed_repeats"] = len(events) - len(collapsed)
        events = collapsed

    short = _per_user(events, np.diff(user_offsets(events)) < config.min_user_events)
    counts["removed_short_users"] = int(short.sum())
    counts["users_short"] = _num_users(events.take(short))
    events = events.take(~short)

    recent = _is_recent(events, config.max_length)
    counts["removed_over_length"] = int((~recent).sum())
    events = events.take(recent)
    counts["events_kept"], counts["users_kept"] = len(events), _num_users(events)
    return events, counts


def user_offsets(events: FlatEvents) -> NDArray[np.int64]:
    """Where each user begins, and the number of events at the end: shape `[users + 1]`."""
    return np.append(_run_starts(events.user), len(events))


def is_bot(events: FlatEvents, config: CleaningConfig) -> Mask:
    """Events of users that have more events, in all or on one day (UTC), than a person has."""
    offsets = user_offsets(events)
    bots = np.zeros(len(offsets) - 1, bool)
    if config.max_events_per_user is not None:
        bots |= np.diff(offsets) > config.max_events_per_user
    if config.max_events_per_day is not None:
        days = _run_starts(events.user, events.timestamp_us // _DAY_US)
        crowded = days[np.diff(days, append=len(events)) > config.max_events_per_day]
        bots[np.searchsorted(offsets, crowded, side="right") - 1] = True
    return _per_user(events, bots)


def collapse_repeats(events: FlatEvents) -> FlatEvents:
    """Keeps the first event of each run of one item, with the event type of the run's last."""
    first = _run_starts(events.user, events.item)
    last = np.append(first[1:], len(events)) - 1
    kept = events.take(first)
    event_type = events.event_type[last[: len(first)]]
    return FlatEvents(kept.user, kept.item, event_type, kept.timestamp_us, kept.device)


def _run_starts(*keys: Ints) -> NDArray[np.int64]:
    """Index of each row that differs from the one before in any of the keys, row 0 included."""
    starts = np.ones(len(keys[0]), bool)
    starts[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return np.flatnonzero(starts)


def _per_user(events: FlatEvents, flags: Mask) -> Mask:
    return np.repeat(flags, np.diff(user_offsets(events)))


def _is_recent(events: FlatEvents, max_length: int | None) -> Mask:
    if max_length is None:
        return np.ones(len(events), bool)
    offsets = user_offsets(events)
    after = np.repeat(offsets[1:], np.diff(offsets)) - np.arange(len(events))
    return after <= max_length


def _num_users(events: FlatEvents) -> int:
    return len(user_offsets(events)) - 1

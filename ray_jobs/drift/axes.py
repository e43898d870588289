"""What counts of drift are told apart by: groups of users, and slots of time, which are each day of
a reference period of whole windows, and the current window.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from data_lake.buckets import hash_ids

DAY_US = 86_400_000_000
NUM_GROUPS = 256


def group_of(ids: pa.Array) -> np.ndarray:
    """Group of users by their ids, int64; it has nothing to do with their bucket."""
    if len(ids) == 0:
        return np.empty(0, np.int64)
    return (hash_ids(ids) >> np.uint64(40)).astype(np.int64) % NUM_GROUPS


@dataclass(frozen=True)
class Periods:
    """Times are microseconds in UTC; a day is 24 hours from the period's own beginning, whole weeks
    hold every weekday equally often.
    """

    reference_until_us: int
    current_until_us: int
    num_windows: int
    """Of the reference period."""
    days: int
    """Of a window, and of the current period."""

    @property
    def window_us(self) -> int:
        return self.days * DAY_US

    @property
    def reference_from_us(self) -> int:
        return self.reference_until_us - self.num_windows * self.window_us

    @property
    def current_from_us(self) -> int:
        return self.current_until_us - self.window_us

    @property
    def first_us(self) -> int:
        """Where the earlier period begins."""
        return min(self.reference_from_us, self.current_from_us)

    @property
    def num_slots(self) -> int:
        """A slot for each day of the reference, and one for the current period."""
        return self.num_windows * self.days + 1

    def slot_of(self, times_us: np.ndarray) -> np.ndarray:
        """Slot of each time, int64; -1 outside of both periods."""
        days = (times_us - self.reference_from_us) // DAY_US
        is_reference = (days >= 0) & (days < self.num_slots - 1)
        is_current = (times_us >= self.current_from_us) & (times_us < self.current_until_us)
        slots = np.where(is_current, self.num_slots - 1, -1)
        return np.where(is_reference, days, slots)

    def window_start_us(self, slots: np.ndarray) -> np.ndarray:
        """Beginning of the window of the reference period that a slot lies in."""
        starts: np.ndarray = self.reference_from_us + slots // self.days * self.window_us
        return starts

    def describe(self) -> dict[str, str]:
        """The four times, for people."""
        return {
            "reference_from": as_text(self.reference_from_us),
            "reference_until": as_text(self.reference_until_us),
            "current_from": as_text(self.current_from_us),
            "current_until": as_text(self.current_until_us),
        }


def as_text(moment_us: int) -> str:
    return datetime.fromtimestamp(moment_us / 1_000_000, UTC).isoformat(timespec="seconds")


def as_us(moment: datetime) -> int:
    """Microseconds in UTC, which is meant where a time names no zone."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return round(aware.timestamp() * 1_000_000)

"""Groups of users and slots of time."""

import numpy as np
import pyarrow as pa

from ray_jobs.drift.axes import DAY_US, NUM_GROUPS, Periods, group_of


def test_slots_are_days_of_the_reference_and_the_current_period():
    periods = Periods(2 * DAY_US, 5 * DAY_US, 2, 1)
    times = np.array([-1, 0, DAY_US, 2 * DAY_US, 4 * DAY_US, 5 * DAY_US])
    assert periods.slot_of(times).tolist() == [-1, 0, 1, -1, 2, -1]
    assert periods.window_start_us(np.array([0, 1])).tolist() == [0, DAY_US]


def test_groups_of_users_are_all_used():
    groups = group_of(pa.array([f"u{n}" for n in range(20_000)]))
    assert set(groups) == set(range(NUM_GROUPS))
    assert len(group_of(pa.array([], pa.string()))) == 0

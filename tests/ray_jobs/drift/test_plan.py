"""What the tasks of a run share."""

import numpy as np
import pyarrow as pa

from ray_jobs.drift.axes import group_of
from ray_jobs.drift.plan import VisitorTimes, Visits


def test_visits_know_the_group_of_their_user():
    nothing = np.empty(0, np.int64)
    visits = Visits("user_id", pa.array(["u1", "u2"]), np.array([0, 1, 1]), nothing, nothing, {})
    first, second = group_of(pa.array(["u1", "u2"]))
    assert visits.groups_N.tolist() == [first, second, second]


def test_events_are_sorted_by_visitor_and_time():
    times, items = np.array([30_000, 20_000, 10_000]), np.array([7, 8, 9])
    types = {"event_type": pa.array(["x", "y", "z"])}
    visits = Visits.sort("session_id", pa.array(["b", "a", "b"]), times, items, types)
    assert visits.visitor_ids.to_pylist() == ["b", "a"]
    assert visits.visitors_N.tolist() == [0, 0, 1]
    assert visits.items_N.tolist() == [9, 7, 8]
    assert visits.columns["event_type"].to_pylist() == ["z", "x", "y"]
    found = VisitorTimes.of(visits, 5_000).count_until(np.array([0, 1]), np.array([10_000, 19_000]))
    assert found.tolist() == [1, 2]

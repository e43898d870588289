"""Events that most tests of counts look at."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.drift.axes import DAY_US, Periods
from ray_jobs.drift.items import count_items
from tests.ray_jobs.drift.toys import plan_of


@pytest.fixture
def toy(tmp_path):
    """A file of events at day, user, item, type, device and session; and a plan: two reference
    days, one more between, and a current day.
    """
    rows = [
        (0.1, "u1", "a", "view", "mobile", "s1"),
        (0.2, "u1", "b", "view", "tv", "s1"),
        (1.2, "u1", "a", "purchase", None, None),
        (2.5, "u1", "d", "view", "mobile", "s2"),
        (3.1, "u1", "d", "view", "mobile", "s3"),
        (3.2, "u2", "a", "view", "desktop", "s4"),
    ]
    days, users, items, types, devices, sessions = zip(*rows, strict=True)
    times = pa.array([round(day * DAY_US) for day in days], pa.timestamp("us", tz="UTC"))
    path = str(tmp_path / "events.parquet")
    table = pa.table(
        {
            "user_id": users,
            "item_id": items,
            "event_type": types,
            "device": devices,
            "session_id": sessions,
            "timestamp": times,
        }
    )
    pq.write_table(table, path)
    periods = Periods(2 * DAY_US, 4 * DAY_US, 2, 1)
    counted = count_items([path], periods, {})
    return path, plan_of(counted, periods=periods)

"""Rows of the exposure log and of the events table on their way to their visitors."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.online.visitors import Period, first_shown, load_events, load_lists, tally_group
from recsys.attribution import CLICK, OTHER, PURCHASE
from serve_app.exposures import SCHEMA

PERIOD = Period(
    control="v1",
    treatment="v2",
    start_us=100,
    until_us=200,
    end_us=250,
    window_us=50,
    before_us=60,
    clicks=("click", "view"),
    purchases=("purchase",),
)


@pytest.fixture
def shown(tmp_path):
    """A file of the exposure log; rows (user, session, time, version)."""

    def write(*rows):
        users, sessions, times, versions = zip(*rows, strict=True)
        columns = {
            "recommendation_id": [f"r{n}" for n in range(len(rows))],
            "user_id": users,
            "session_id": sessions,
            "timestamp": pa.array(times, pa.int64()).cast(SCHEMA.field("timestamp").type),
            "model_version": versions,
            "source": ["model"] * len(rows),
            "degraded": [False] * len(rows),
            "item_ids": [["x"]] * len(rows),
            "top_score": [1.0] * len(rows),
        }
        pq.write_table(pa.table(columns, schema=SCHEMA), tmp_path / "shown.parquet")
        return [str(tmp_path / "shown.parquet")]

    return write


@pytest.fixture
def done(tmp_path):
    """A file of the events table with int64 ids; rows (user, session, time, type)."""

    def write(*rows):
        users, sessions, times, types = zip(*rows, strict=True)
        columns = {
            "user_id": users,
            "session_id": pa.array(sessions, pa.string()),
            "item_id": [7] * len(rows),
            "event_type": types,
            "timestamp": pa.array(times, pa.int64()).cast(SCHEMA.field("timestamp").type),
        }
        pq.write_table(pa.table(columns), tmp_path / "done.parquet")
        return [str(tmp_path / "done.parquet")]

    return write


def test_lists_of_both_versions_are_kept_and_others_counted(shown):
    files = shown(
        ("1", None, 100, "v1"),
        ("2", None, 199, "v2"),
        (None, "s", 150, "v2"),
        ("1", None, 99, "v1"),
        ("1", None, 250, "v1"),
        ("1", None, 200, "v1"),
        ("1", None, 150, "v0"),
        (None, None, 150, "v1"),
    )
    lists, counts = load_lists(files, PERIOD, 1)
    found = set(zip(lists["visitor"].to_pylist(), lists["arm"].to_pylist(), strict=True))
    assert found == {("user 1", 0), ("user 2", 1), ("session s", 1)}
    assert lists.num_rows == 3
    assert dict(counts) == {
        "of_other_versions": 1,
        "without_visitor": 1,
        "too_young": 1,
        "of_sessions": 1,
    }


def test_events_are_kept_for_what_they_can_tell(done):
    files = done(
        (1, None, 39, "view"),
        (1, None, 40, "view"),
        (1, None, 99, "rating"),
        (1, None, 100, "rating"),
        (1, None, 100, "click"),
        (1, None, 249, "purchase"),
        (1, None, 250, "purchase"),
    )
    events, num_events = load_events(files, PERIOD, 1, with_sessions=False)
    assert events["timestamp"].cast(pa.int64()).to_pylist() == [40, 99, 100, 249]
    assert events["kind"].to_pylist() == [CLICK, OTHER, CLICK, PURCHASE]
    assert set(events["visitor"].to_pylist()) == {"user 1"}
    assert set(events["item_id"].to_pylist()) == {"7"}
    assert num_events == 4


def test_an_event_counts_for_its_session_too_where_sessions_saw_lists(done):
    files = done((1, "s", 120, "click"), (2, None, 120, "click"))
    events, num_events = load_events(files, PERIOD, 1, with_sessions=True)
    assert sorted(events["visitor"].to_pylist()) == ["session s", "user 1", "user 2"]
    assert num_events == 2


def test_a_visitor_has_one_group_for_lists_and_events(shown, done):
    rows = [(n, None, 150, "v1") for n in range(40)]
    *lists, _ = load_lists(shown(*((str(n), *more) for n, *more in rows)), PERIOD, 4)
    done_by_all = done(*((n, None, 160, "click") for n in range(40)))
    *events, _ = load_events(done_by_all, PERIOD, 4, with_sessions=False)
    groups = [set(some["visitor"].to_pylist()) for some in lists]
    assert groups == [set(some["visitor"].to_pylist()) for some in events]
    assert all(groups)
    assert sum(map(len, groups)) == 40


def test_a_group_without_events_is_added_up(shown, done):
    *lists, _ = load_lists(shown(("1", None, 150, "v1")), PERIOD, 1)
    *events, _ = load_events(done((2, None, 10, "view")), PERIOD, 1, with_sessions=True)
    found = tally_group(PERIOD, 1, *lists, *events)
    assert (found.control.num_users, found.treatment.num_users) == (1, 0)
    assert found.control.total("clicked_lists") == 0


def test_the_first_list_of_a_version_is_found(shown):
    files = shown(("1", None, 30, "v1"), ("2", None, 20, "v2"), ("2", None, 10, "v2"))
    assert first_shown(files, "v2", {}) == 10
    assert first_shown(files, "v3", {}) is None

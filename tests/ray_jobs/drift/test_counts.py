"""What the users of a bucket did, and what sessions did that nobody knows the user of."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from data_lake.buckets import hash_ids
from ray_jobs.drift.axes import DAY_US, Periods, group_of
from ray_jobs.drift.counts import SESSION_EVENTS, count_bucket, count_sessions
from ray_jobs.drift.items import MISSING, OTHER
from ray_jobs.drift.lists import join_sessions
from recsys.drift import HEAD, TORSO, UNSEEN
from tests.ray_jobs.drift.toys import HOUR, NO_SESSIONS, counts_of, shown


def test_events_are_counted_by_slot_and_value(toy):
    path, plan = toy
    counts, _ = count_bucket([path], [], plan, NO_SESSIONS)
    assert counts_of(counts, plan, "context_device") == {
        0: {"mobile": 1, OTHER: 1},
        1: {MISSING: 1},
        2: {"mobile": 1, "desktop": 1},
    }
    assert counts_of(counts, plan, "categories") == {
        0: {"x": 1, MISSING: 1},
        1: {"x": 1},
        2: {"x": 1, MISSING: 1},
    }
    assert counts_of(counts, plan, "context_segment")[2] == {MISSING: 2}
    assert counts_of(counts, plan, "context_hour")[0] == {"02": 1, "04": 1}


def test_items_are_unknown_where_the_version_or_an_earlier_one_lacks_them(toy):
    path, plan = toy
    counts, _ = count_bucket([path], [], plan, NO_SESSIONS)
    # On day 0 everything is new; on day 3 the catalogue decides.
    assert counts_of(counts, plan, "unknown_items") == {
        0: {"unknown": 2},
        1: {"known": 1},
        2: {"known": 1, "unknown": 1},
    }


def test_histories_are_the_events_of_two_days_before(toy):
    path, plan = toy
    counts, _ = count_bucket([path], [], plan, NO_SESSIONS)
    assert counts_of(counts, plan, "history_length") == {
        0: {"0": 1, "1": 1},
        1: {"2-4": 1},
        2: {"0": 1, "2-4": 1},
    }


def test_popularity_is_what_the_other_half_of_the_users_made_it(toy):
    path, plan = toy
    is_odd = group_of(pa.array(["u1"]))[0] % 2
    mine, others = plan.items.popularity_HI[is_odd], plan.items.popularity_HI[1 - is_odd]
    # Item d is turned to in the current period alone: both periods sort events.
    first, last = plan.items.find(pa.array(["a", "d"]))
    assert (mine[first], mine[last], set(others)) == (HEAD, TORSO, {UNSEEN})
    counts, _ = count_bucket([path], [], plan, NO_SESSIONS)
    assert counts_of(counts, plan, "popularity")[0] == {"unseen": 2}


def test_events_of_nobody_are_counted_as_nothing(toy):
    path, plan = toy
    late = replace(
        plan, periods=Periods(200 * DAY_US, 300 * DAY_US, 2, 1), events_until_us=300 * DAY_US
    )
    counts, _ = count_bucket([path], [], late, NO_SESSIONS, shown((299.5, "u1", ["a"])))
    assert not counts["popularity"].any()
    assert counts["live_click_through"].sum() == 1


def answers_of(lists, *buckets, plan):
    """Counts of lists of sessions, which tasks of several buckets find the events of."""
    sessions = join_sessions(hash_ids(lists["session_id"].combine_chunks()))
    events = [count_bucket(files, [], plan, sessions)[1] for files in buckets]
    return count_sessions(plan, 1, lists, *events)


def test_lists_of_a_session_are_answered_by_its_events(toy):
    path, plan = toy
    lists = shown(
        (0.1 - HOUR / 2, "s1", ["a"]),  # next is a: hit, click
        (0.2 - HOUR / 2, "s1", ["a"]),  # next is b: miss
        (3.1 - HOUR / 2, "s4", ["d"]),  # the lake knows the session, which does nothing so soon
        (3.1 - HOUR / 2, "s9", ["d"]),  # of which the lake knows nothing: left out
        known_by="session_id",
    )
    counts = answers_of(lists, [path], plan=plan)
    assert counts_of(counts, plan, "live_hit_rate") == {0: {"hit": 1, "miss": 1}}
    assert counts_of(counts, plan, "live_click_through") == {
        0: {"click": 1, "no click": 1},
        2: {"no click": 1},
    }
    assert counts_of(counts, plan, "coverage")[2]["lists"] == 2


def test_the_events_of_a_session_may_lie_in_several_buckets(toy, tmp_path):
    path, plan = toy
    plan = replace(plan, attribution_us=3 * 3600 * 1_000_000)
    events, buckets = pq.read_table(path), []
    for number, user in enumerate(("u1", "u2")):
        part = events.slice(number, 1).set_column(0, "user_id", pa.array([user]))
        buckets.append([str(tmp_path / user)])
        pq.write_table(part, tmp_path / user)
    lists = shown((0.1 - HOUR / 2, "s1", ["b"]), known_by="session_id")
    counts = answers_of(lists, *buckets, plan=plan)
    assert counts_of(counts, plan, "live_hit_rate") == {0: {"miss": 1}}
    assert counts_of(counts, plan, "live_click_through") == {0: {"click": 1}}


def test_events_of_other_sessions_do_not_travel(toy):
    path, plan = toy
    _, nothing = count_bucket([path], [], plan, NO_SESSIONS)
    assert nothing == SESSION_EVENTS.empty_table()
    _, events = count_bucket([path], [], plan, hash_ids(pa.array(["s3"])))
    assert events["session_id"].to_pylist() == ["s3"]
    assert events["time_us"].to_pylist() == [round(3.1 * DAY_US)]


def test_without_events_of_their_sessions_lists_still_cover(toy):
    _, plan = toy
    lists = shown((0.1, "s7", ["a"]), (0.2, None, ["a"]), known_by="session_id")
    counts = count_sessions(plan, 1, lists, SESSION_EVENTS.empty_table())
    assert set(counts) == {"coverage"}
    assert counts_of(counts, plan, "coverage")[0]["lists"] == 2
    assert count_sessions(plan, 0, SESSION_EVENTS.empty_table()) == {}

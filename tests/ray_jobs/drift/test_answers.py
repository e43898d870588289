"""What lists cover, how they score, and what their visitors did next."""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from ray_jobs.drift.answers import count_lists
from ray_jobs.drift.counts import count_bucket
from tests.ray_jobs.drift.toys import HOUR, NO_SESSIONS, counts_of, shown


def test_lists_are_hit_by_the_next_event_and_clicked_by_any(toy):
    path, plan = toy
    plan = replace(plan, attribution_us=3 * 3600 * 1_000_000)
    lists = shown(
        (0.1 - HOUR, "u1", ["b", "a"]),  # next is a: hit, click
        (0.1, "u1", ["a"]),  # what happens at that very moment is no answer; next is b: miss
        (0.1 - HOUR / 2, "u1", ["b"]),  # next is a: miss; b comes within three hours: click
        (1.2 - 4 * HOUR, "u1", ["a"]),  # too early for an answer
        (1.2 - HOUR, "u3", ["a"]),  # nobody answers
        (3.2 - HOUR, "u2", []),  # nothing was shown
        (4 - HOUR, "u2", ["a"]),  # the window is still open
    )
    counts, _ = count_bucket([path], [], plan, NO_SESSIONS, lists)
    assert counts_of(counts, plan, "live_hit_rate") == {0: {"hit": 1, "miss": 2}, 2: {"miss": 1}}
    assert counts_of(counts, plan, "live_click_through") == {
        0: {"click": 2, "no click": 1},
        1: {"no click": 2},
        2: {"no click": 1},
    }
    plan = replace(plan, click_types=("purchase",))
    purchases, _ = count_bucket([path], [], plan, NO_SESSIONS, lists)
    assert counts_of(purchases, plan, "live_click_through")[0] == {"no click": 3}


def test_the_eleventh_item_is_no_hit(toy):
    path, plan = toy
    lists = shown((0.1 - HOUR / 2, "u1", ["z"] * 10 + ["a"]))
    counts, _ = count_bucket([path], [], plan, NO_SESSIONS, lists)
    assert counts_of(counts, plan, "live_hit_rate") == {0: {"miss": 1}}
    assert counts_of(counts, plan, "live_click_through") == {0: {"click": 1}}


def test_coverage_counts_lists_and_those_of_each_known_item(toy):
    _, plan = toy
    lists = shown((0.1, "u1", ["a", "d", "z"]), (0.2, None, ["a", "b"]), (2.5, "u1", ["c"]))
    counts = count_lists(lists, plan)
    (found,) = counts_of(counts, plan, "coverage").values()
    assert sorted(found.values()) == [1, 2, 2]
    assert found["lists"] == 2


def test_scores_are_counted_by_decile(toy):
    _, plan = toy
    lists = shown((0.1, "u1", ["a"]), (0.2, "u1", ["a"]), (3.5, "u1", ["a"]))
    lists = lists.set_column(5, "score", pa.array([0.5, np.nan, 2.5]))
    counts = count_lists(lists, plan := replace(plan, score_edges=(1.0, 2.0)))
    assert counts_of(counts, plan, "scores") == {0: {"above -inf": 1}, 2: {"above 2": 1}}

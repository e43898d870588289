"""What can be judged, what is said where nothing can, and the facts of a verdict."""

import numpy as np
import pytest

from ray_jobs.drift.axes import NUM_GROUPS
from ray_jobs.drift.gather import Gathered
from ray_jobs.drift.report import describe_verdict
from ray_jobs.drift.verdict import current_share, find_gaps, judge
from ray_jobs.sections.upkeep import MonitorConfig

MONITOR = MonitorConfig(false_alarm_rate=0.05, num_resamples=100)


def gathered(plan, **changes):
    """Counts of a plan with three slots: the same everywhere, where nothing else is said."""
    counts = {
        name: np.ones((NUM_GROUPS, plan.periods.num_slots, len(measure.labels)), np.int64)
        for name, measure in plan.measures.items()
    }
    return Gathered(counts | changes, plan, first_event_us=-(10**15))


def test_a_measure_without_counts_says_why_it_has_no_verdict(toy):
    _, plan = toy
    early, now, few = (gathered(plan).counts["items"].copy() for _ in range(3))
    early[:, 0], now[:, -1], few[19:] = 0, 0, 0
    found = gathered(plan, items=early, categories=now, popularity=few)
    del found.counts["coverage"], found.counts["scores"]
    gaps = find_gaps(found)
    assert set(gaps) == {"items", "categories", "popularity", "coverage", "scores"}
    assert gaps["items"] == (
        "of the 2 windows of 1 days that end with 1970-01-03T00:00:00+00:00 some have no counts; "
        "wait for more history, lower monitor.days, or choose another monitor.reference_until"
    )
    assert gaps["categories"] == "nothing was counted in the current period"
    assert gaps["popularity"].endswith("has counts in fewer than 20 groups of users")
    assert gaps["coverage"] == "no list was logged"
    assert set(judge(MONITOR, found, gaps)) == set(plan.measures) - set(gaps)


def test_items_are_known_to_be_new_only_with_a_window_before_the_reference(toy):
    _, plan = toy
    late = Gathered(gathered(plan).counts, plan, first_event_us=0)
    assert find_gaps(late)["unknown_items"].startswith("the lake's events begin on 1970-01-01")


def test_a_verdict_has_both_sides(toy):
    _, plan = toy
    clicks = gathered(plan).counts["live_click_through"].copy()
    clicks[:, -1] = 9, 0
    found = gathered(plan, live_click_through=clicks)
    verdict = judge(MONITOR, found, find_gaps(found))["live_click_through"]
    assert verdict["alarm"]
    assert (verdict["reference"], verdict["current"], verdict["drift"]) == (0.5, 0, 0.5)
    assert verdict["num_current"] == 9 * NUM_GROUPS
    assert current_share(found, "live_click_through") == 0
    assert current_share(found, "nothing") is None


@pytest.mark.parametrize(
    ("alarms", "expected"),
    [
        ({}, "No measure could be judged."),
        ({"items": False}, "None of 1 measures moved beyond what happens without drift."),
        ({"items": True, "scores": False}, "1 of 2 measures moved: items."),
    ],
)
def test_a_verdict_in_a_sentence(alarms, expected):
    facts = {"measures": {name: {"alarm": alarm} for name, alarm in alarms.items()}}
    assert describe_verdict(facts) == expected

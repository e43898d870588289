"""Simulated canaries are judged as the job judges them, and seldom wrongly."""

import numpy as np
import pytest

from benchmarks.canary import (
    LIMITS,
    LOOKS,
    Ends,
    Traffic,
    draw_lists,
    follow,
    make_cases,
    render,
    simulate,
    sum_buyers,
    sum_clicks,
    sum_degraded,
)
from ray_jobs.online.canary_rules import decide, look_at
from recsys.attribution import Tally
from recsys.experiment import COLUMNS, DEGRADED, METRICS, Moments
from recsys.sequential import Sums

TRAFFIC = Traffic(users=1500, share=0.5, effect=0.5, degraded=0.05)


def known_at(lists, look):
    """Both arms as the job would have them at a look."""
    arms = []
    for side in (False, True):
        rows = (lists["is_treated"] == side) & (lists["look"] <= look)
        users = lists["user"][rows]
        sums = {
            name: np.bincount(users, lists[name][rows], TRAFFIC.users)
            for name in ("clicked", "bought", "degraded")
        }
        num_lists = np.bincount(users, minlength=TRAFFIC.users)
        columns = {
            "users": np.ones(TRAFFIC.users),
            "lists": num_lists,
            "clicked_lists": sums["clicked"],
            "bought_lists": sums["bought"],
            "buyers": sums["bought"] > 0,
            "before": np.zeros(TRAFFIC.users),
            "degraded_lists": sums["degraded"],
        }
        values = np.stack([columns[name] for name in COLUMNS], axis=1).astype(float)
        arms.append(Moments.of(values[num_lists > 0]))
    return Tally(*arms)


@pytest.mark.parametrize("look", [40, LOOKS - 1])
def test_sums_over_time_are_those_of_the_moments(look):
    lists = draw_lists(TRAFFIC, np.random.default_rng(1))
    found = known_at(lists, look)
    arm = {name: rows[lists["is_treated"]] for name, rows in lists.items()}
    for measure, metric in (
        (sum_clicks, METRICS["click_through"]),
        (sum_buyers, METRICS["conversion"]),
        (sum_degraded, DEGRADED),
    ):
        at_look = [column[look] for column in measure(arm)]
        assert at_look == pytest.approx(list(Sums.of(found.treatment, metric)))


def test_a_canary_ends_where_the_rules_of_the_job_end_it():
    lists = draw_lists(TRAFFIC, np.random.default_rng(2))
    end, look, _, _ = follow(lists, TRAFFIC.share)
    assert end != 0
    decisions = []
    for hour in (look - 1, look):
        found = known_at(lists, hour)
        seen = look_at(found, found, TRAFFIC.share, hour / 24, LIMITS)
        decisions.append(decide(seen, LIMITS).decision)
    assert decisions == ["wait", {1: "promote", -1: "roll back"}[end]]


def test_no_worse_canary_is_promoted_and_no_equal_one_ends_before_the_end():
    worse = simulate(Traffic(users=1500, share=0.5, effect=-0.3), 60)
    equal = simulate(Traffic(users=1500, share=0.5), 60)
    assert worse.promoted == 0
    assert worse.rolled_back > 0.3
    # 5 % are allowed: six of 60 would come once in a hundred times.
    assert equal.promoted + equal.rolled_back <= 6 / 60
    # As often looked at, intervals of a fixed end would have ended every fifth at least.
    assert equal.fixed_promoted + equal.fixed_rolled_back > 0.2


def test_the_cases_are_worse_equal_and_better():
    effects = {traffic.effect for traffic in make_cases().values()}
    assert {-0.3, -0.1, 0.0, 0.1, 0.3} == effects


def test_the_record_tells_every_end():
    text = render({"equal": (Traffic(), Ends(0.01, 0.02, 0.1, 0.2, 0.5, 4.25))}, 400, 9.0)
    assert "| equal | 20% | 1.0% | 2.0% | 4.2 | 50.0% | 47.0% | 10.0% | 20.0% |" in text

"""Intervals that hold at all looks: by hand at one, by simulation at many."""

import math

import numpy as np
import pytest

from recsys.experiment import METRICS, Moments
from recsys.sequential import check_ratio_again, measure_gap, mixture_radius

CLICKS = METRICS["click_through"]


def arm(*users):
    """Moments of users given as (lists, of these clicked)."""
    return Moments.of(
        np.array([[1, lists, clicked, 0, 0, 0, 0] for lists, clicked in users], float)
    )


def test_the_radius_is_that_of_the_normal_mixture():
    """Where the likelihood ratio of the mixture against 0 is one over the error rate."""
    variance, wanted, error_rate = 0.5, 2.0, 0.05
    radius = float(mixture_radius(variance, wanted, error_rate))

    total = variance + wanted**2
    ratio = math.sqrt(variance / total) * math.exp(wanted**2 * radius**2 / (2 * variance * total))
    assert ratio == pytest.approx(1 / error_rate)


def test_an_estimate_without_variance_has_no_radius():
    assert mixture_radius([0.0, 1.0], 1.0, 0.05)[0] == 0


def test_a_gap_is_the_difference_of_both_rates_with_the_variance_of_all_users():
    control = arm(*[(1, 1), (1, 0)] * 50)
    treatment = arm(*[(2, 2), (2, 0), (2, 0), (2, 0)] * 25)
    found = measure_gap(control, treatment, CLICKS, wanted=0.1, error_rate=0.05)

    assert (found.control, found.treatment) == (0.5, 0.25)
    squares = 100 * 0.5**2 + 25 * 1.5**2 + 75 * 0.5**2
    variance = squares / 198 * (100 / 100**2 + 100 / 200**2)
    radius = float(mixture_radius(variance, 0.1, 0.05))
    assert found.interval.mean == pytest.approx(-0.25)
    assert found.interval.high == pytest.approx(-0.25 + radius)
    assert found.relative.low == pytest.approx(2 * (-0.25 - radius))


def test_a_bar_above_control_is_taken_off():
    control, treatment = arm(*[(1, 1), (1, 0)] * 50), arm(*[(1, 1), (1, 0)] * 50)
    found = measure_gap(control, treatment, CLICKS, wanted=0.1, error_rate=0.05, least_uplift=0.1)
    assert found.interval.mean == pytest.approx(0.5 - 1.1 * 0.5)


@pytest.mark.parametrize(
    ("control", "treatment"),
    [
        (arm(*[(1, 1)] * 100), arm((1, 1))),
        (arm(*[(1, 0)] * 1000), arm(*[(1, 0)] * 1000)),
        # Half of 39 lists would be clicked: one short of twenty.
        (arm(*[(1, 1), (1, 0)] * 500), arm(*[(1, 1), (1, 0)] * 19, (1, 0))),
        (Moments.none(), Moments.none()),
    ],
    ids=["one user", "no click", "few clicks", "nobody"],
)
def test_of_too_little_nothing_is_said(control, treatment):
    assert measure_gap(control, treatment, CLICKS, wanted=0.1, error_rate=0.05) is None


def test_an_arm_without_a_click_has_an_interval_all_the_same():
    found = measure_gap(
        arm(*[(1, 1), (1, 0)] * 5000), arm(*[(1, 0)] * 50), CLICKS, wanted=0.1, error_rate=0.05
    )
    assert found.interval.low < -0.5 < found.interval.high < 0


def test_few_of_many_canaries_ever_err_though_they_are_looked_at_hourly():
    rng = np.random.default_rng(3)
    means = np.cumsum(rng.normal(size=(2000, 336)), axis=1) / np.arange(1, 337)
    radius = mixture_radius(1 / np.arange(1, 337), 0.1, 0.05)
    ever = (np.abs(means) > radius).any(axis=1).mean()
    # An interval for one look errs here in more than every third.
    fixed = (np.abs(means) > 1.96 / np.sqrt(np.arange(1, 337))).any(axis=1).mean()
    assert ever < 0.05
    assert fixed > 0.33


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_the_sample_ratio_may_be_asked_about_at_every_visitor(share):
    rng = np.random.default_rng(5)
    ours = np.cumsum(rng.random((300, 500)) < share, axis=1)
    alarms = [
        any(check_ratio_again(n + 1 - one, one, share).is_alarm for n, one in enumerate(row))
        for row in ours.tolist()
    ]
    assert sum(alarms) <= 2


def test_missing_visitors_raise_an_alarm_and_their_absence_none():
    assert check_ratio_again(95_000, 4_000, 0.05).is_alarm
    assert not check_ratio_again(95_000, 4_950, 0.05).is_alarm
    assert check_ratio_again(0, 0, 0.05).evidence == pytest.approx(1)
    assert check_ratio_again(0, 10_000, 0.05).evidence == math.inf

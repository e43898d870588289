"""Experiments worked out by hand, and simulated ones whose effect is known."""

import math

import numpy as np
import pytest

from benchmarks.experiment import (
    CLICK_RATE,
    Traffic,
    detectable_effect,
    draw_experiment,
    measure_alarms,
    measure_power,
    measure_rates,
    simulate,
)
from recsys.experiment import (
    COLUMNS,
    METRICS,
    Moments,
    Ratio,
    adjust,
    check_sample_ratio,
    compare_arms,
    measure_ratio,
    relative_uplift,
)

REPLICATIONS = 600


def of_users(*users):
    """Each user as (lists, clicked lists), who bought nothing."""
    return Moments.of(
        np.array([[1, lists, clicked, 0, 0, 0, 0] for lists, clicked in users], float)
    )


def binomial_bounds(share, num=REPLICATIONS, deviations=3.5):
    """Where a share of `num` draws lies but once in two thousand times."""
    spread = deviations * math.sqrt(share * (1 - share) / num)
    return share - spread, share + spread


@pytest.fixture(scope="module")
def without_effect():
    return measure_rates(Traffic(), REPLICATIONS)


@pytest.fixture(scope="module")
def with_effect():
    return measure_rates(Traffic(effect=0.2), REPLICATIONS, seed=1)


def test_a_ratio_is_a_ratio_of_sums_with_the_variance_of_its_residuals():
    # 3 of 6 lists; residuals clicked - lists / 2 of the users: 1/2, 0, -1/2.
    found = measure_ratio(of_users((1, 1), (2, 1), (3, 1)), "click_through")
    assert found.mean == 1 / 2
    assert found.variance == pytest.approx(3 / 2 * (1 / 4 + 1 / 4) / 6**2)


def test_a_mean_over_users_has_the_variance_of_a_mean():
    lists = [1, 2, 6]
    found = measure_ratio(of_users(*((num, 0) for num in lists)), "lists_per_user")
    assert found.mean == 3
    assert found.variance == pytest.approx(np.var(lists, ddof=1) / 3)


def test_moments_of_groups_of_users_add_up():
    whole = of_users((1, 1), (2, 0), (5, 3))
    sum_of_parts = of_users((1, 1)) + of_users((2, 0), (5, 3)) + Moments.none()
    assert np.array_equal(whole.products_CC, sum_of_parts.products_CC)
    assert whole.num_users == 3
    assert whole.total("lists") == 8


def test_more_of_a_metric_is_an_uplift_of_both_kinds():
    control, treatment = of_users((4, 1), (4, 1), (4, 2)), of_users((4, 2), (4, 2), (4, 3))
    found = compare_arms(control, treatment, "click_through")
    assert found.difference.mean == pytest.approx(7 / 12 - 4 / 12)
    assert found.relative.mean == pytest.approx(7 / 4 - 1)
    assert found.difference.low < found.difference.mean < found.difference.high
    assert found.is_significant == (found.p_value < 0.05)


def test_the_ends_of_fiellers_interval_are_where_the_difference_is_just_beyond_noise():
    ours, theirs = Ratio(0.30, 0.0004), Ratio(0.20, 0.0001)
    found = relative_uplift(ours, theirs)
    for end in (found.low, found.high):
        difference = ours.mean - (1 + end) * theirs.mean
        spread = math.sqrt(ours.variance + (1 + end) ** 2 * theirs.variance)
        assert abs(difference) / spread == pytest.approx(1.959964)


def test_there_is_no_relative_uplift_over_what_may_be_nothing():
    assert relative_uplift(Ratio(0.3, 0.01), Ratio(0.001, 0.0001)) is None
    nothing = compare_arms(of_users((4, 0), (2, 0)), of_users((4, 0), (1, 0)), "click_through")
    assert nothing.relative is None
    assert not nothing.is_significant
    assert nothing.p_value == 1
    assert nothing.days_needed(7, 0.02) == math.inf


@pytest.mark.parametrize("metric", METRICS)
def test_an_arm_without_two_users_has_no_uplift(metric):
    with pytest.raises(ValueError, match=f"{metric} needs two users who saw a list, and there are"):
        compare_arms(of_users((1, 1)), of_users((1, 1), (2, 1)), metric)


def test_an_unknown_metric_names_those_that_there_are():
    arm = of_users((1, 1), (2, 1))
    with pytest.raises(ValueError, match="no metric 'revenue'; choose one of: click_through"):
        compare_arms(arm, arm, "revenue")


def test_95_percent_of_the_intervals_hold_the_truth(without_effect, with_effect):
    low, high = binomial_bounds(0.95)
    for rates in (without_effect, with_effect):
        assert low < rates.covered < high
        assert low < rates.covered_relative < high


def test_5_percent_of_the_experiments_without_effect_find_one(without_effect):
    low, high = binomial_bounds(0.05)
    assert low < without_effect.found < high
    assert low < without_effect.found_adjusted < high


def test_intervals_that_count_lists_are_wrong_far_too_often(without_effect, with_effect):
    # Users who click often see many lists: as draws of their own these look like certainty.
    assert without_effect.covered_by_lists < 0.80
    assert with_effect.covered_by_lists < 0.80


def test_what_users_did_before_takes_variance_out_and_leaves_the_effect(with_effect):
    assert with_effect.variance_kept < 0.9
    assert with_effect.found_adjusted > with_effect.found
    adjusted = [
        compare_arms(*adjust(*arms, "click_through"), "click_through").difference.mean
        for arms in simulate(Traffic(effect=0.2), 200, 2)
    ]
    error = np.std(adjusted) / math.sqrt(len(adjusted))
    assert np.mean(adjusted) == pytest.approx(CLICK_RATE * 0.2, abs=3.5 * error)


def test_users_without_a_past_are_left_as_they_are():
    control, treatment = of_users((1, 1), (2, 1)), of_users((1, 0), (2, 1))
    assert adjust(control, treatment, "click_through") == (control, treatment)


def test_the_detectable_uplift_is_found_four_times_in_five():
    effect = detectable_effect(Traffic())
    assert 0.2 < effect < 0.5
    low, high = binomial_bounds(0.8, 400)
    # Clicks of a user who often clicks are less random than the uplift's share is taken to be.
    assert low < measure_power(Traffic(effect=effect), 400) < high + 0.03


def test_the_detectable_uplift_is_the_one_that_needs_no_more_days():
    found = compare_arms(*draw_experiment(Traffic(), np.random.default_rng(0)), "click_through")
    assert found.days_needed(10, found.detectable) == pytest.approx(10)
    assert found.days_needed(10, found.detectable / 2) > 30


def test_nothing_is_detectable_with_a_few_users():
    few = compare_arms(of_users((1, 1), (1, 0)), of_users((1, 1), (1, 0)), "click_through")
    assert few.detectable == math.inf


def test_the_sample_ratio_of_a_48_to_52_split_raises_an_alarm():
    found = check_sample_ratio(9_600, 10_400, 0.5)
    assert found.share == 0.52
    # Chi-square by hand: (400 ** 2 / 10000) * 2 = 32.
    assert found.p_value == pytest.approx(math.erfc(math.sqrt(32 / 2)))
    assert found.is_alarm
    assert measure_alarms(20_000, 0.5, 0.52, 500) > 0.95


def test_the_sample_ratio_of_a_right_split_is_quiet():
    assert not check_sample_ratio(8_950, 1_050, 0.1).is_alarm
    assert measure_alarms(20_000, 0.1, 0.1, 2_000) < 0.005


def test_a_sample_ratio_needs_users():
    with pytest.raises(ValueError, match="needs users"):
        check_sample_ratio(0, 0, 0.5)


def test_the_first_column_counts_users():
    assert COLUMNS[0] == "users"

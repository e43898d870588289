"""Paired comparisons of two rankings."""

import numpy as np
import pytest

from recsys.comparison import compare


def test_a_ranking_equals_itself():
    ranks_N = np.array([1, 5, 30, 2])
    found = compare(ranks_N, ranks_N)
    assert (found.difference.mean, found.difference.low, found.difference.high) == (0, 0, 0)
    assert not found.is_significant


def test_difference_and_lift_are_those_of_the_means():
    # HR@10: 3 of 4 against 2 of 4.
    found = compare(np.array([1, 2, 3, 99]), np.array([1, 2, 99, 99]), metric="HR@10")
    assert found.difference.mean == 1 / 4
    assert found.difference.low <= 1 / 4 <= found.difference.high


def test_lift_is_relative_to_theirs():
    theirs = np.repeat([1, 99], [200, 800])
    ours = np.repeat([1, 99], [300, 700])
    found = compare(ours, theirs, metric="HR@10")
    assert found.lift.mean == pytest.approx(0.3 / 0.2 - 1)
    assert found.is_better
    assert found.is_significant


def test_a_worse_ranking_is_significant_but_not_better():
    found = compare(np.repeat([99, 1], [300, 700]), np.ones(1000, int))
    assert found.is_significant
    assert not found.is_better


def test_pairing_narrows_the_interval():
    generator = np.random.default_rng(0)
    theirs = generator.integers(1, 30, 2000)
    ours = np.maximum(theirs - 1, 1)
    paired = compare(ours, theirs).difference
    unpaired = compare(generator.permutation(ours), theirs).difference
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 3


def test_the_same_seed_gives_the_same_comparison():
    ours, theirs = np.random.default_rng(0).integers(1, 30, (2, 100))
    assert compare(ours, theirs, seed=5) == compare(ours, theirs, seed=5)
    assert compare(ours, theirs, seed=5) != compare(ours, theirs, seed=6)


def test_there_is_no_lift_over_nothing():
    assert compare(np.array([1, 1]), np.array([99, 99])).lift is None


def test_other_users_are_an_error():
    with pytest.raises(ValueError, match="2 ranks against 3"):
        compare(np.array([1, 2]), np.array([1, 2, 3]))


def test_an_unknown_metric_is_named():
    with pytest.raises(ValueError, match="no metric 'AUC'"):
        compare(np.array([1]), np.array([1]), metric="AUC")

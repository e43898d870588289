"""Paired comparisons of two rankings."""

import numpy as np
import pyarrow as pa
import pytest

from recsys.comparison import align_ranks, compare, compare_seeds, find_target_difference

RANKS = pa.table({"user_id": ["a", "b", "c"], "item_id": [1, 2, 3], "model": [10, 20, 30]})


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


def test_ranks_are_taken_in_the_order_of_our_users():
    assert align_ranks(RANKS.take([2, 0, 1]), RANKS, "model").tolist() == [30, 10, 20]


def test_ids_of_another_type_are_the_same_ids():
    numbers = pa.table({"user_id": [7, 8], "item_id": ["1", "2"], "model": [3, 4]})
    texts = pa.table({"user_id": ["8", "7"], "item_id": [2, 1], "model": [5, 6]})
    assert align_ranks(numbers, texts, "model").tolist() == [6, 5]


@pytest.mark.parametrize(
    ("theirs", "difference"),
    [
        (RANKS, None),
        (RANKS.slice(0, 2), "3 users are ranked against 2, and 2 of them are the same"),
        (
            RANKS.set_column(0, "user_id", pa.array(["a", "b", "x"])),
            "3 users are ranked against 3, and 2 of them are the same",
        ),
        (
            RANKS.set_column(1, "item_id", pa.array([1, 9, 9])),
            "2 of the 3 users stand before another item",
        ),
    ],
)
def test_what_differs_is_said(theirs, difference):
    assert find_target_difference(RANKS, theirs) == difference


def test_other_targets_are_not_compared():
    with pytest.raises(ValueError, match="on the same targets alone: 3 users are ranked against 1"):
        align_ranks(RANKS, RANKS.slice(0, 1), "model")


def test_of_several_trainings_each_user_counts_with_the_mean():
    # HR@10 of the users: 1 / 2, 1 and 0 against 0, 1 and 0.
    ours_SN, theirs_SN = np.array([[1, 2, 99], [99, 3, 99]]), np.array([[99, 1, 99], [99, 1, 99]])
    found = compare_seeds(ours_SN, theirs_SN, metric="HR@10")
    assert found.difference.mean == pytest.approx(1 / 2 / 3)
    once = compare(ours_SN[0], theirs_SN[0], metric="HR@10")
    assert compare_seeds(ours_SN[:1], theirs_SN[:1], metric="HR@10") == once


def test_trainings_are_compared_on_the_same_users():
    with pytest.raises(ValueError, match="needs the same users: 3 ranks against 2"):
        compare_seeds(np.ones((2, 3), int), np.ones((2, 2), int))
    with pytest.raises(ValueError, match="There is no metric 'x'"):
        compare_seeds(np.ones((2, 3), int), np.ones((2, 3), int), metric="x")

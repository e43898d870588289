"""Metrics against values worked out by hand."""

import time
from math import log2

import numpy as np
import pytest

from recsys.catalogue import PAD
from recsys.metrics import (
    accuracy,
    accuracy_intervals,
    hit_rate,
    interval,
    list_quality,
    mean_accuracy,
    ndcg,
    reciprocal_rank,
    resampled_means,
)

RANKS = np.array([1, 2, 10, 11])


def test_a_hit_is_a_rank_within_k():
    assert hit_rate(RANKS, 10).tolist() == [1, 1, 1, 0]


def test_ndcg_is_the_gain_of_one_position():
    assert ndcg(RANKS, 10) == pytest.approx([1, 1 / log2(3), 1 / log2(11), 0])


def test_reciprocal_rank_stops_at_k():
    assert reciprocal_rank(RANKS, 10) == pytest.approx([1, 1 / 2, 1 / 10, 0])


@pytest.mark.parametrize(("k", "hits"), [(5, 2 / 4), (10, 3 / 4), (20, 4 / 4)])
def test_each_cutoff_has_its_own_mean(k, hits):
    assert mean_accuracy(RANKS)[f"HR@{k}"] == hits


def test_there_are_three_metrics_at_three_cutoffs():
    assert set(accuracy(RANKS)) == {f"{m}@{k}" for m in ("HR", "NDCG", "MRR") for k in (5, 10, 20)}


def test_the_interval_of_equal_values_is_a_point():
    found = interval(np.full(50, 0.25))
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)


def test_the_interval_is_that_of_a_proportion():
    # 1.96 * sqrt(0.2 * 0.8 / 10,000) = 0.00784
    found = interval(np.repeat([1.0, 0.0], [2_000, 8_000]))
    assert found.mean == 0.2
    assert found.high - found.mean == pytest.approx(0.00784, rel=0.1)
    assert found.mean - found.low == pytest.approx(0.00784, rel=0.1)


def test_the_same_seed_gives_the_same_interval():
    assert accuracy_intervals(RANKS, seed=3) == accuracy_intervals(RANKS, seed=3)
    assert accuracy_intervals(RANKS, seed=3) != accuracy_intervals(RANKS, seed=4)


def test_the_order_of_users_changes_no_interval():
    assert accuracy_intervals(RANKS) == accuracy_intervals(RANKS[::-1])


def test_resampling_keeps_the_columns_of_a_user_together():
    values = np.random.default_rng(0).random(30)
    means_RC = resampled_means(np.stack([values, 2 * values], axis=1), num_resamples=5)
    assert means_RC[:, 1] == pytest.approx(2 * means_RC[:, 0])


def test_half_a_million_users_are_cheap():
    ranks_N = np.random.default_rng(0).integers(1, 1000, 500_000)
    started = time.perf_counter()
    interval(ndcg(ranks_N, 10))
    assert time.perf_counter() - started < 2


def test_no_user_is_an_error():
    with pytest.raises(ValueError, match="no user to resample"):
        interval(np.array([]))


def test_lists_of_everything_cover_everything():
    counts_I = np.array([0, 0, 1, 2])
    assert list_quality(np.array([[2, 3], [3, 2]]), counts_I)["coverage@10"] == 1


def test_novelty_is_the_mean_self_information():
    # Counts of 1 and 5 become 2 and 6 of 8: 2 bits and log2(8 / 6).
    counts_I = np.array([0, 0, 1, 5])
    found = list_quality(np.array([[2], [3], [3]]), counts_I, k=1)
    assert found["novelty@1"] == pytest.approx((2 + 2 * log2(8 / 6)) / 3)


def test_popularity_is_the_mean_percentile():
    # Four items with 1, 1, 2, 9 events stand at 1/4, 1/4, 5/8 and 7/8.
    counts_I = np.array([0, 0, 1, 1, 2, 9])
    found = list_quality(np.array([[5, 2]]), counts_I)
    assert found["popularity@10"] == pytest.approx((7 / 8 + 1 / 4) / 2)


def test_pads_at_the_end_of_a_list_change_nothing():
    counts_I = np.array([0, 0, 1, 1, 2, 9])
    padded = np.array([[5, 2, PAD, PAD]])
    assert list_quality(padded, counts_I) == list_quality(padded[:, :2], counts_I)


def test_equal_exposure_has_no_inequality():
    counts_I = np.array([0, 0, 1, 2])
    assert list_quality(np.array([[2, 3], [3, 2]]), counts_I)["gini@10"] == 0


def test_gini_is_half_the_mean_difference_over_the_mean():
    # Shown 3, 1, 0 and 0 times: the six pairs differ by 2, 3, 3, 1, 1 and 0, so the mean over all
    # 16 ordered ones is 20 / 16; the mean count is 1.
    counts_I = np.array([0, 0, 1, 1, 1, 1])
    found = list_quality(np.array([[2], [2], [2], [3]]), counts_I, k=1)
    assert found["gini@1"] == pytest.approx(20 / 16 / 2)


def test_diversity_is_the_share_of_pairs_of_other_categories():
    categories_I = np.array([-1, -1, 0, 0, 1, -1])
    lists = np.array([[2, 3, 4], [2, 4, PAD], [2, 5, PAD]])
    # Two of three pairs, one of one; the third list has one known category and does not count.
    found = list_quality(lists, np.arange(6), categories_I=categories_I)
    assert found["diversity@10"] == pytest.approx((2 / 3 + 1) / 2)


def test_without_categories_there_is_no_diversity():
    assert "diversity@10" not in list_quality(np.array([[2, 3]]), np.arange(4))


def test_empty_lists_have_figures_too():
    found = list_quality(np.array([[PAD]]), np.arange(4), categories_I=np.zeros(4, int))
    assert set(found.values()) == {0.0}

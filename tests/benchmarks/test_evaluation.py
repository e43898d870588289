"""The benchmarks of ranking, made small."""

import numpy as np
import pytest

from benchmarks import metrics_check
from benchmarks.evaluation import CASES, Size, draw_store, rank_case


@pytest.mark.parametrize("scorer", sorted({scorer for scorer, _ in CASES.values()}))
def test_every_scorer_ranks(scorer):
    found = rank_case(scorer, Size(users=20, items=200, events=5))
    assert found.seconds > 0
    assert min(found.peak_bytes, found.held_bytes) > 0


def test_the_drawn_store_has_the_size_that_was_asked():
    store = draw_store(Size(users=20, items=200, events=5))
    assert (store.num_users, store.num_tokens) == (20, 100)
    assert store.items_T.min() >= 2
    assert store.items_T.max() < 202


def test_the_largest_difference_is_that_of_any_user():
    assert metrics_check.largest_difference(np.array([1.0, 2.0]), np.array([1.0, 1.5])) == 0.5
    with pytest.raises(ValueError, match="2 values cannot be compared with 1"):
        metrics_check.largest_difference(np.zeros(2), np.zeros(1))

"""Full ranking: ties, seen items, and what a scorer may give."""

import numpy as np
import pytest
import torch

from recsys.catalogue import PAD
from recsys.evaluation import rank_targets, seen_items

INF = float("inf")


class Fixed:
    """Gives everybody the same scores of items 0, 1, 2, ..."""

    name = "fixed"

    def __init__(self, *scores):
        self._scores = torch.tensor([-INF, -INF, *scores])

    def score(self, store, users_B, targets_B):
        return self._scores.repeat(len(users_B), 1)


def rank_last(store, scorer, **options):
    users = np.arange(store.num_users)
    return rank_targets(scorer, store, users, store.offsets_U[1:] - 1, **options)


def test_the_best_item_has_rank_one(make_store):
    store = make_store([[0, 1], [0, 2], [0, 3]])
    found = rank_last(store, Fixed(0.0, 3.0, 2.0, 1.0))
    assert found.ranks_N.tolist() == [1, 2, 3]


def test_ties_count_against_us(make_store):
    store = make_store([[0, 1]])
    assert rank_last(store, Fixed(0.0, 1.0, 1.0, 1.0)).ranks_N.tolist() == [3]


def test_equal_scores_for_all_rank_last(make_store):
    store = make_store([[0, 1]])
    assert rank_last(store, Fixed(0, 0, 0, 0), filter_seen=False).ranks_N.tolist() == [4]


def test_seen_items_do_not_stand_before_the_target(make_store):
    store = make_store([[0, 1, 2]])
    scorer = Fixed(3.0, 2.0, 1.0, 0.0)
    assert rank_last(store, scorer, filter_seen=True).ranks_N.tolist() == [1]
    assert rank_last(store, scorer, filter_seen=False).ranks_N.tolist() == [3]


def test_a_target_that_was_seen_ranks_behind_every_item(make_store):
    store = make_store([[0, 1, 0]])
    num_rows = 2 + 4
    assert rank_last(store, Fixed(9.0, 2.0, 1.0, 0.0)).ranks_N.tolist() == [num_rows]


def test_the_list_is_best_first_without_seen_items(make_store):
    store = make_store([[0, 1]])
    found = rank_last(store, Fixed(9.0, 2.0, 1.0, 3.0), top_k=2)
    assert found.top_NK.tolist() == [[3 + 2, 1 + 2]]


def test_a_list_that_runs_out_of_items_ends_in_padding(make_store):
    store = make_store([[0, 1, 2]])
    found = rank_last(store, Fixed(9.0, 2.0, 1.0))
    assert found.top_NK.tolist() == [[2 + 2, PAD, PAD]]


def test_batches_change_nothing(make_store):
    store = make_store([[0, 1], [2, 3, 1], [1, 0]])
    whole = rank_last(store, Fixed(1.0, 3.0, 2.0, 0.0))
    parts = rank_last(store, Fixed(1.0, 3.0, 2.0, 0.0), batch_size=1)
    assert whole.ranks_N.tolist() == parts.ranks_N.tolist()
    assert whole.top_NK.tolist() == parts.top_NK.tolist()


def test_seen_items_end_before_the_target(make_store):
    store = make_store([[0, 1, 2], [3, 0]])
    rows, items = seen_items(store, np.array([0, 1]), np.array([2, 4]))
    assert rows.tolist() == [0, 0, 1]
    assert (items - 2).tolist() == [0, 1, 3]


def test_a_score_that_is_not_a_number_is_an_error(make_store):
    with pytest.raises(ValueError, match="fixed gave a score that is not a number"):
        rank_last(make_store([[0, 1]]), Fixed(0.0, 1.0, float("nan")))


def test_nothing_to_rank_is_an_error(make_store):
    nobody = np.array([], np.int64)
    with pytest.raises(ValueError, match="no target to rank"):
        rank_targets(Fixed(0.0), make_store([[0, 1]]), nobody, nobody)

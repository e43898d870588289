"""Flat positions and sparse matrices."""

import numpy as np
import pytest
from scipy import sparse

from recsys.interactions import (
    blocks_of,
    event_matrix,
    find_recent,
    history_matrix,
    keep_best,
    spans,
    training_counts,
)


def test_spans_are_ranges_one_after_the_other():
    assert spans(np.array([2, 5, 7]), np.array([4, 5, 9])).tolist() == [2, 3, 7, 8]


def test_counts_are_of_training_alone(make_store, hold_out_last):
    store = make_store([[0, 1, 1, 2], [1, 0]])
    assert training_counts(store, hold_out_last(store), 5).tolist() == [0, 0, 1, 3, 0]


def test_a_history_holds_each_item_once(make_store):
    store = make_store([[0, 1, 0, 2]])
    found = history_matrix(store, np.array([0]), np.array([3]), 5)
    assert found.toarray().tolist() == [[0, 0, 1, 1, 0]]


def test_events_fade_with_their_age(make_store):
    store = make_store([[0, 1, 0, 2]])
    found = event_matrix(store, np.array([0]), np.array([4]), 5, decay=0.5)
    assert found.toarray().tolist() == [[0, 0, 0.125 + 0.5, 0.25, 1]]


def test_the_best_entries_of_a_row_stay_in_their_order():
    matrix = sparse.csr_array(np.array([[1.0, 3, 2], [0, 0, 0], [5, 5, 0]]))
    kept = keep_best(matrix, 2)
    assert kept.indices.tolist() == [1, 2, 0, 1]
    assert kept.indptr.tolist() == [0, 2, 2, 4]


@pytest.mark.parametrize("budget", [1, 3, 100])
def test_blocks_cover_every_row_once(budget):
    blocks = list(blocks_of(np.array([0, 2, 2, 9, 0, 1]), budget))
    assert [first for first, _ in blocks[1:]] == [last for _, last in blocks[:-1]]
    assert (blocks[0][0], blocks[-1][1]) == (0, 6)


def test_recent_events_lie_within_the_days():
    days = np.array([0, 5, 8, 10])
    assert find_recent(days * 86_400_000_000, 3).tolist() == [False, False, True, True]
    assert find_recent(np.array([], np.int64), 3).tolist() == []

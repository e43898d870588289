"""Full ranking: ties, seen items, and what a scorer may give."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.catalogue import NUM_SPECIAL, PAD
from recsys.errors import ScoreError
from recsys.evaluation import block_size, rank_targets, seen_items, top_scores
from recsys.tokens import TokenStore

INF = float("inf")
NUM_ITEMS = 7


class Fixed:
    """Gives everybody the same scores of items 0, 1, 2, ..."""

    name = "fixed"

    def __init__(self, *scores):
        self._scores = torch.tensor([-INF, -INF, *scores])

    def score(self, store, users_B, targets_B):
        return self._scores.repeat(len(users_B), 1)


class Table:
    """Scores `[U, I]` that were fixed beforehand."""

    name = "table"

    def __init__(self, scores_UI):
        self.scores_UI = scores_UI
        self.blocks = []

    def score(self, store, users_B, targets_B):
        self.blocks.append(len(users_B))
        return self.scores_UI[users_B].clone()


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
    with pytest.raises(ScoreError, match="fixed gave a score that is not a number"):
        rank_last(make_store([[0, 1]]), Fixed(0.0, 1.0, float("nan")))


def test_nothing_to_rank_is_an_error(make_store):
    nobody = np.array([], np.int64)
    with pytest.raises(ValueError, match="no target to rank"):
        rank_targets(Fixed(0.0), make_store([[0, 1]]), nobody, nobody)


# Few different scores, so that ties are common.
histories = st.lists(st.integers(0, NUM_ITEMS - 1), min_size=2, max_size=6)
scores = st.lists(st.integers(0, 3), min_size=NUM_ITEMS, max_size=NUM_ITEMS)


@given(st.lists(st.tuples(histories, scores), min_size=1, max_size=5), st.booleans())
def test_ranks_and_lists_are_those_of_a_ranking_by_hand(users, filter_seen):
    store = store_of([history for history, _ in users])
    scores_UI = torch.tensor([[-INF, -INF, *values] for _, values in users])
    found = rank_last(store, Table(scores_UI), filter_seen=filter_seen, top_k=4)
    for (history, values), rank, top in zip(users, found.ranks_N, found.top_NK, strict=True):
        *seen, target = history
        allowed = [n for n in range(NUM_ITEMS) if not (filter_seen and n in seen)]
        behind = [n for n in allowed if values[n] >= values[target]]
        assert rank == (len(behind) if target in allowed else NUM_ITEMS + NUM_SPECIAL)
        shown = [item - NUM_SPECIAL for item in top if item != PAD]
        best = sorted((values[n] for n in allowed), reverse=True)[:4]
        assert [values[n] for n in shown] == best
        assert set(shown) <= set(allowed)
        assert len(set(shown)) == len(shown)


def store_of(sequences):
    offsets_U = np.cumsum([0, *map(len, sequences)]).astype(np.int64)
    items_T = np.concatenate(sequences).astype(np.int32) + NUM_SPECIAL
    none_TF = np.zeros((len(items_T), 0), np.uint8)
    ids = pa.array(range(len(sequences)))
    return TokenStore(ids, offsets_U, items_T, none_TF, np.arange(len(items_T)))


@given(st.integers(0, 2**32), st.integers(1, 1000), st.integers(1, 20))
def test_chunks_give_the_largest_scores_of_a_wide_row(seed, num_rows, k):
    generator = torch.Generator().manual_seed(seed)
    scores_BI = torch.randint(0, 50, (3, num_rows), generator=generator).float()
    best_BK, columns_BK = top_scores(scores_BI, min(k, num_rows))
    assert torch.equal(best_BK, scores_BI.topk(min(k, num_rows)).values)
    assert torch.equal(scores_BI.gather(1, columns_BK), best_BK)
    assert all(len(set(columns)) == len(columns) for columns in columns_BK.tolist())


def test_a_broken_score_is_found_in_a_wide_row(make_store):
    scores = torch.zeros(1000)
    scores[700] = float("nan")
    with pytest.raises(ScoreError, match="not a number"):
        rank_last(make_store([[0, 1]]), Fixed(*scores.tolist()))


@pytest.mark.parametrize(("num_rows", "users"), [(3_418, 512), (2_000_002, 67), (10**9, 1)])
def test_a_block_has_half_a_gibibyte_of_scores(num_rows, users):
    assert block_size(num_rows) == users
    assert users == 1 or users * num_rows * 4 <= 2**29


def test_the_first_user_tells_how_many_are_scored_at_once(make_store, monkeypatch):
    monkeypatch.setattr("recsys.evaluation._SCORES_PER_BLOCK", 3 * 6)
    store = make_store([[0, 1]] * 8)
    table = Table(torch.arange(6.0).repeat(8, 1))
    assert len(rank_last(store, table).ranks_N) == 8
    assert table.blocks == [1, 3, 3, 1]

"""Each baseline on three users, with scores worked out by hand.

Training: u0 sees a, b, c; u1 sees a, b; u2 sees b, c. So a, b, c have 2, 3, 2 events and d none.
"""

import dataclasses
from math import sqrt

import numpy as np
import pytest
import torch

from recsys.baselines import (
    ALS,
    BASELINES,
    EASE,
    Covisitation,
    ItemKNN,
    Popularity,
    RecentPopularity,
    make_baselines,
)
from recsys.context import NO_TIME
from recsys.covisitation import DECAY
from recsys.evaluation import rank_targets
from recsys.interactions import training_matrix
from recsys.splits import temporal_cut, whole_sequences

A, B, C, D = range(4)
SEQUENCES = [[A, B, C, D], [A, B, C], [B, C, A]]
NUM_ROWS = 6
NEVER = -float("inf")
HOUR_US = 3_600_000_000


@pytest.fixture
def toy(make_store, hold_out_last):
    """The store and its split."""
    store = make_store(SEQUENCES)
    return store, hold_out_last(store)


def score(baseline, store, user):
    """Scores of a, b, c, d for the last event of a user."""
    users_B = np.array([user])
    scores_BI = baseline.score(store, users_B, store.offsets_U[users_B + 1] - 1)
    assert scores_BI[0, :2].tolist() == [NEVER, NEVER]
    return scores_BI[0, 2:].tolist()


def about(*values):
    # Ties are broken by 1e-6 at most.
    return pytest.approx(values, abs=2e-6)


def test_popularity_counts_training_events(toy):
    assert score(Popularity().fit(*toy, NUM_ROWS), toy[0], 1) == [2, 3, 2, 0]


@pytest.fixture
def clicks(make_store, hold_out_last):
    """Of three users, and their split: the last one of u0 is at 11:30, that of u1 at 11:00."""
    store = make_store([[A, B, D], [A, C, D], [A, D, C]])
    hours_T = np.array([0, 9, 11.5, 1, 10, 11, 8, 10.5, 13])
    store = dataclasses.replace(store, timestamps_T=(hours_T * HOUR_US).astype(np.int64))
    return store, hold_out_last(store)


def test_recent_popularity_counts_the_days_before_the_full_hour(clicks):
    fitted = RecentPopularity(days=2 / 24).fit(*clicks, NUM_ROWS)
    # From 9:00 until before 11:00: b, c and d. Training has a three times, the others once.
    assert score(fitted, clicks[0], 0) == pytest.approx([3 / 4, 1 + 1 / 4, 1 + 1 / 4, 1 + 1 / 4])
    # Before 13:00 of u2 there are the d of 11:00 and of 11:30, which others hold out.
    assert score(fitted, clicks[0], 2) == pytest.approx([3 / 4, 1 / 4, 1 / 4, 2 + 1 / 4])


def test_hours_that_are_scored_together_are_those_scored_alone(clicks):
    store, split = clicks
    fitted = RecentPopularity(days=2 / 24).fit(*clicks, NUM_ROWS)
    together = fitted.score(store, np.arange(3), split.test_U)[:, 2:].tolist()
    assert together == [score(fitted, store, user) for user in range(3)]
    # Targets in the order of their times: 11:00, 11:30, 13:00.
    assert together[0] == together[1] != together[2]


@pytest.mark.parametrize(("places", "is_read"), [([2, 5, 8], False), ([7], True)])
def test_recent_popularity_reads_nothing_from_its_hour_on(clicks, places, is_read):
    store, split = clicks
    items_T = store.items_T.copy()
    items_T[places] = A + 2
    other = dataclasses.replace(store, items_T=items_T)
    before = RecentPopularity(days=1).fit(store, split, NUM_ROWS)
    after = RecentPopularity(days=1).fit(other, split, NUM_ROWS)
    assert (score(before, store, 0) != score(after, store, 0)) == is_read


def test_recent_popularity_of_a_cut_counts_what_came_after_training(make_store):
    store = make_store([[A, A, B, C], [A, D]], days=[[0, 1, 20, 21], [0, 22]])
    split = temporal_cut(store.offsets_U, store.timestamps_T, 10 * 24 * HOUR_US, 22 * 24 * HOUR_US)
    assert split.test_U.tolist() == [-1, 5]
    fitted = RecentPopularity(days=7).fit(store, split, NUM_ROWS)
    # All that trains is a, three times, and older than a week on day 22.
    assert score(fitted, store, 1) == pytest.approx([3 / 4, 1, 1, 0])


def test_without_a_time_recent_popularity_is_that_of_training(toy):
    store = dataclasses.replace(toy[0], timestamps_T=np.full(len(toy[0].items_T), NO_TIME))
    fitted = RecentPopularity().fit(store, toy[1], NUM_ROWS)
    assert score(fitted, store, 0) == pytest.approx([2 / 4, 3 / 4, 2 / 4, 0])


def test_covisitation_weighs_distance_direction_and_age(toy):
    # Forward: a-b 2, b-c 2, a-c 1/2; backward half of it; over 2, 3, 2 occurrences.
    fitted = Covisitation(window=2, backward=0.5).fit(*toy, NUM_ROWS)
    a_to_b, a_to_c = 2 / 2, (1 / 2) / 2
    b_to_a, b_to_c = 1 / 3, 2 / 3
    assert score(fitted, toy[0], 1) == about(b_to_a, DECAY * a_to_b, b_to_c + DECAY * a_to_c, 0)


def test_directional_covisitation_looks_forward_only(toy):
    fitted = Covisitation(window=1, backward=0).fit(*toy, NUM_ROWS)
    # u2 saw b, then c: c leads nowhere, b leads to c.
    assert score(fitted, toy[0], 2) == about(0, 0, DECAY * 2 / 3, 0)


def test_covisitation_keeps_the_best_neighbours(toy):
    fitted = Covisitation(window=2, backward=0.5, neighbours=1).fit(*toy, NUM_ROWS)
    # Of a only b is left, of b only c.
    assert score(fitted, toy[0], 1) == about(0, DECAY * 1, 2 / 3, 0)


def test_item_knn_sums_shrunk_cosines(toy):
    fitted = ItemKNN(shrinkage=1).fit(*toy, NUM_ROWS)
    a_b = b_c = 2 / (sqrt(2 * 3) + 1)
    a_c = 1 / (sqrt(2 * 2) + 1)
    assert score(fitted, toy[0], 1) == about(a_b, a_b, a_c + b_c, 0)


def test_item_knn_keeps_the_best_neighbours(toy):
    fitted = ItemKNN(shrinkage=1, neighbours=1).fit(*toy, NUM_ROWS)
    # The one neighbour of a is b; of b's two equal ones the lower index, a, stays.
    a_b = 2 / (sqrt(2 * 3) + 1)
    assert score(fitted, toy[0], 1) == about(a_b, a_b, 0, 0)


@pytest.mark.parametrize("baseline", [Covisitation(backward=0, window=1), ItemKNN(neighbours=1)])
def test_without_evidence_popularity_decides(make_store, hold_out_last, baseline):
    store = make_store([[A, B, A], [C, D, A], [C, D, A], [C, A]])
    fitted = baseline.fit(store, hold_out_last(store), NUM_ROWS)
    _, _, c, d = score(fitted, store, 0)
    assert 1e-6 >= c > d > 0


def test_ease_is_its_closed_form(toy):
    ridge = 2.0
    x_UI = training_matrix(*toy, NUM_ROWS).toarray().astype(float)
    inverse = np.linalg.inv(x_UI.T @ x_UI + ridge * np.eye(NUM_ROWS))
    weights = np.eye(NUM_ROWS) - inverse / np.diag(inverse)
    fitted = EASE(ridge=ridge).fit(*toy, NUM_ROWS)
    for user in range(3):
        expected = (x_UI[user] @ weights)[2:]
        assert score(fitted, toy[0], user) == pytest.approx(expected, abs=1e-6)


def test_ease_refuses_a_catalogue_that_it_cannot_invert(toy):
    with pytest.raises(ValueError, match=r"stops at 15,000 items; the catalogue has 15,001"):
        EASE().fit(*toy, 15_003)


@pytest.fixture
def two_tastes(make_store, hold_out_last):
    """Forty users of items 0 to 4, forty of items 5 to 9; the last event is of the other kind."""
    generator = np.random.default_rng(0)
    low = [[*generator.permutation(5)[:4], 5] for _ in range(40)]
    high = [[*(5 + generator.permutation(5)[:4]), 0] for _ in range(40)]
    store = make_store(low + high)
    return store, hold_out_last(store)


def test_als_recommends_what_similar_users_had(two_tastes):
    fitted = ALS(factors=4).fit(*two_tastes, 12)
    for user, own, other in ((0, slice(0, 5), slice(5, 10)), (79, slice(5, 10), slice(0, 5))):
        scores = np.array(score(fitted, two_tastes[0], user))
        assert scores[own].min() > scores[other].max()


def test_als_reads_a_history_that_it_was_not_trained_on(two_tastes, make_store):
    fitted = ALS(factors=4).fit(*two_tastes, 12)
    newcomer = make_store([[5, 6, 7, 8]])
    scores = np.array(score(fitted, newcomer, 0))
    assert scores[5:].min() > scores[:5].max()


@pytest.mark.parametrize("name", BASELINES)
def test_the_target_is_never_read(two_tastes, name):
    store, split = two_tastes
    user = np.array([9])
    items_T = store.items_T.copy()
    items_T[split.test_U[user]] = 2
    changed = dataclasses.replace(store, items_T=items_T)
    (one,), (other,) = make_baselines((name,)), make_baselines((name,))
    scores = one.fit(store, split, 12).score(store, user, split.test_U[user])
    again = other.fit(changed, split, 12).score(changed, user, split.test_U[user])
    assert torch.equal(scores, again)


@pytest.mark.parametrize("name", BASELINES)
def test_users_without_training_events_disturb_nobody(make_store, name):
    store = make_store([[], [A, B, C, D], [], [A, B, C]])
    ends_U = store.offsets_U[1:]
    split = dataclasses.replace(
        whole_sequences(store.offsets_U), train_end_U=np.maximum(ends_U - 1, store.offsets_U[:-1])
    )
    (baseline,) = make_baselines((name,))
    users = np.array([1, 3])
    ranking = rank_targets(
        baseline.fit(store, split, NUM_ROWS), store, users, store.offsets_U[users + 1] - 1
    )
    assert ((ranking.ranks_N >= 1) & (ranking.ranks_N <= 4)).all()


@pytest.mark.parametrize("name", BASELINES)
def test_scores_belong_to_the_caller(toy, name):
    (baseline,) = make_baselines((name,))
    baseline.fit(*toy, NUM_ROWS)
    users = np.arange(3)
    first = baseline.score(toy[0], users, toy[1].test_U)
    before = first.clone()
    first.zero_()
    assert torch.equal(baseline.score(toy[0], users, toy[1].test_U), before)
    assert before.dtype == torch.float32


def test_blocks_of_items_change_no_neighbour(two_tastes, monkeypatch):
    whole = Covisitation().fit(*two_tastes, 12), ItemKNN().fit(*two_tastes, 12)
    monkeypatch.setattr("recsys.covisitation._OCCURRENCES_PER_BLOCK", 7)
    monkeypatch.setattr("recsys.baselines._PAIRS_PER_BLOCK", 7)
    parts = Covisitation().fit(*two_tastes, 12), ItemKNN().fit(*two_tastes, 12)
    for one, other in zip(whole, parts, strict=True):
        assert score(one, two_tastes[0], 3) == score(other, two_tastes[0], 3)


def test_baselines_are_made_by_name():
    assert [one.name for one in make_baselines(tuple(BASELINES))] == list(BASELINES)
    with pytest.raises(ValueError, match="no baseline 'magic'; choose of: popularity"):
        make_baselines(("magic",))


# Recent popularity reads those that lie before the hour of a target, see above.
@pytest.mark.parametrize("name", [name for name in BASELINES if name != "recent-popularity"])
def test_held_out_items_change_no_score(name, toy, hold_out_last):
    store, _ = toy
    items_T = store.items_T.copy()
    for place in store.offsets_U[1:] - 1:
        items_T[place] = NUM_ROWS - 1 - (items_T[place] - 2)
    other = dataclasses.replace(store, items_T=items_T)
    assert not np.array_equal(other.items_T, store.items_T)
    fits = [
        make_baselines([name])[0].fit(log, hold_out_last(log), NUM_ROWS) for log in (store, other)
    ]
    for user in range(3):
        assert score(fits[0], store, user) == score(fits[1], store, user)

"""Settings of baselines are chosen on validation targets, from the training events of a sample."""

import inspect

import numpy as np
import pytest

from recsys import baseline_search
from recsys.baseline_search import GRIDS, Trial, choose_settings, try_settings
from recsys.baselines import BASELINES, Covisitation
from recsys.evaluation import rank_targets
from recsys.metrics import mean_accuracy
from recsys.splits import leave_one_out

NUM_ROWS = 12
USERS = np.arange(30)


@pytest.fixture
def walks(make_store):
    """Thirty users who walk along ten items in a circle, one step at a time; and their split."""
    store = make_store([[(user * 3 + step) % 10 for step in range(6)] for user in range(30)])
    return store, leave_one_out(store.offsets_U)


@pytest.mark.parametrize("name", GRIDS)
def test_grids_hold_the_defaults_of_the_baselines(name):
    parameters = inspect.signature(BASELINES[name]).parameters
    for setting, values in GRIDS[name].items():
        assert parameters[setting].default in values


def test_all_combinations_are_tried_on_validation_targets(walks):
    store, split = walks
    trials = try_settings("covisitation", *walks, NUM_ROWS, USERS)
    assert len({tuple(trial.settings.items()) for trial in trials}) == len(trials) == 12
    for trial in (trials[0], trials[-1]):
        baseline = Covisitation(**trial.settings).fit(*walks, NUM_ROWS)
        ranks_N = rank_targets(baseline, store, USERS, split.validation_U).ranks_N
        assert trial.ndcg10 == pytest.approx(mean_accuracy(ranks_N)["NDCG@10"])
    # Who walks on one step at a time is followed best by the step after.
    assert choose_settings(trials) == {"window": 1, "backward": 0.0}


def test_the_first_of_the_best_is_chosen():
    trials = [Trial({"ridge": 1}, 0.1), Trial({"ridge": 2}, 0.2), Trial({"ridge": 3}, 0.2)]
    assert choose_settings(trials) == {"ridge": 2}
    assert choose_settings([]) == {}


def test_what_has_no_settings_and_who_has_no_target_is_not_tried(walks):
    assert try_settings("popularity", *walks, NUM_ROWS, USERS) == []
    assert try_settings("ease", *walks, NUM_ROWS, USERS[:0]) == []


def test_a_sample_of_users_is_learned_from(walks, monkeypatch):
    fitted = []

    class Remembers(Covisitation):
        def fit(self, store, split, num_rows):
            fitted.append(split.train_end_U - store.offsets_U[:-1])
            return super().fit(store, split, num_rows)

    monkeypatch.setitem(baseline_search.BASELINES, "covisitation", Remembers)
    store, split = walks
    lengths_U = split.train_end_U - store.offsets_U[:-1]
    for seed in (0, 0, 1):
        try_settings("covisitation", *walks, NUM_ROWS, USERS, max_training_users=7, seed=seed)
    for counts_U in fitted:
        assert (counts_U > 0).sum() == 7
        assert set(counts_U) <= {0, *lengths_U}
    assert np.array_equal(fitted[0], fitted[12])
    assert not np.array_equal(fitted[0], fitted[24])
    try_settings("covisitation", *walks, NUM_ROWS, USERS, max_training_users=30)
    assert np.array_equal(fitted[-1], lengths_U)


def test_items_seen_before_are_ranked_where_they_are_to_be(make_store):
    # Everybody returns to the first item for validation.
    store = make_store([[user % 5, user % 5 + 5, user % 5, 9 - user % 5] for user in range(20)])
    split = leave_one_out(store.offsets_U)
    users = np.arange(20)
    hidden, shown = (
        try_settings("item-knn", store, split, NUM_ROWS, users, filter_seen=filter_seen)
        for filter_seen in (True, False)
    )
    assert max(trial.ndcg10 for trial in hidden) == 0
    assert max(trial.ndcg10 for trial in shown) > 0

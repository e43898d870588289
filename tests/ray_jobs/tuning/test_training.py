"""A training of a search, in this process, and what it never looks at."""

import math

import numpy as np
import pytest
import torch
from ray.train import UserCallback

from ray_jobs.sequences_reader import Vocabulary
from ray_jobs.tuning.training import SearchTask, Validations, resources_of, train_here
from ray_jobs.tuning.trials import Epoch
from ray_jobs.tuning.verdict import train_and_rank
from recsys.splits import leave_one_out
from tests.ray_jobs.test_tune import make_config

RATE = {"optimiser.learning_rate": 5e-3}


@pytest.fixture
def task(shop, tmp_path):
    config = make_config(tmp_path, max_epochs=2, held_out_share=0.4)
    return SearchTask(config, Vocabulary(shop.catalogue, shop.context), tmp_path)


def test_a_plan_has_the_values_of_the_trial_and_the_epochs_of_the_search(task):
    minutes = task.config.train.trainer.model_copy(update={"max_minutes": 0.1})
    train = task.config.train.model_copy(update={"trainer": minutes})
    hurried = SearchTask(
        task.config.model_copy(update={"train": train}), task.vocabulary, task.folder
    )
    plan = hurried.plan(RATE, seed=9)
    assert plan.recipe.optimiser.learning_rate == 5e-3
    assert plan.recipe.model.dim == 16
    assert (plan.config.seed, plan.config.train.trainer.max_epochs) == (9, 2)
    assert plan.config.train.trainer.max_minutes is None


def test_each_validation_is_told_and_the_best_weights_are_kept(task, shop):
    told = []
    weights = train_here(task.plan(RATE, 0), shop.store, told.append, keeps_weights=True)
    assert [one["epoch"] for one in told] == [1, 2]
    assert [one["is_last"] for one in told] == [False, True]
    assert told[-1]["objective"] == max(one["ndcg10"] for one in told)
    assert set(Epoch.__dataclass_fields__) <= told[0].keys()
    model = task.vocabulary.make_model(task.plan(RATE, 0).recipe.model)
    assert weights.keys() == model.state_dict().keys()
    assert train_here(task.plan(RATE, 0), shop.store, told.append) == {}


def test_neither_test_targets_nor_users_held_out_change_a_trial(task, shop):
    def curve(store):
        told = []
        torch.manual_seed(0)
        train_here(task.plan(RATE, 0), store, told.append)
        return [(one["loss"], one["ndcg10"]) for one in told]

    split = leave_one_out(shop.store.offsets_U)
    kept = task.plan(RATE, 0).split(shop.store)
    held = np.flatnonzero((split.validation_U >= 0) & (kept.validation_U < 0))
    assert len(held) == round(0.4 * (split.validation_U >= 0).sum())
    unseen = [split.test_U[split.test_U >= 0], split.validation_U[held]]
    items_T = shop.store.items_T.copy()
    items_T[np.concatenate(unseen)] = 2
    altered = type(shop.store)(
        shop.store.user_ids,
        shop.store.offsets_U,
        items_T,
        shop.store.context_TF,
        shop.store.timestamps_T,
    )
    assert not np.array_equal(items_T, shop.store.items_T)
    assert curve(altered) == curve(shop.store)


def test_a_verdict_ranks_the_users_held_out(task, shop):
    ranks_N = train_and_rank(task, shop.store, RATE, seed=1)
    split = leave_one_out(shop.store.offsets_U)
    assert len(ranks_N) == round(0.4 * (split.validation_U >= 0).sum())
    assert ranks_N.tolist() == train_and_rank(task, shop.store, RATE, seed=1).tolist()


def test_a_group_tells_its_validations_and_knows_the_last(task):
    told = []
    trainer = task.config.train.trainer.model_copy(update={"max_epochs": 9, "patience": 2})
    train = task.config.train.model_copy(update={"trainer": trainer})
    plan = SearchTask(
        task.config.model_copy(
            update={"train": train, "tune": task.config.tune.model_copy(update={"max_epochs": 9})}
        ),
        task.vocabulary,
        task.folder,
    ).plan({}, 0)
    watch: UserCallback = Validations(plan, told.append)
    report = {"loss": 1.0, "ndcg10_error": 0.01}
    for epoch, ndcg10 in enumerate([0.1, 0.3, math.nan, 0.2, 0.3], start=1):
        watch.after_report(None, [report | {"epoch": epoch, "ndcg10": ndcg10}], None)
    watch.after_report(None, [report | {"epoch": 5, "ndcg10": 0.9, "step": 7}], None)
    assert [one["epoch"] for one in told] == [1, 2, 4, 5]
    assert [one["objective"] for one in told] == [0.1, 0.3, 0.3, 0.3]
    # Two validations without a better one: patience is over.
    assert [one["is_last"] for one in told] == [False, False, False, True]


def test_a_group_shares_what_a_trial_is_given(tmp_path):
    shared = make_config(tmp_path, workers_per_trial=4, cpus_per_trial=2, gpus_per_trial=1)
    assert resources_of(shared) == {"CPU": 0.5, "GPU": 0.25}
    assert resources_of(make_config(tmp_path, cpus_per_trial=0.25)) == {"CPU": 0.25}

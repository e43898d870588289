"""The training loop on a store that a model can learn by heart."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.errors import TrainingError
from recsys.model import NextItemModel
from recsys.recipe import OptimiserConfig, read_recipe
from recsys.splits import leave_one_out
from recsys.tokens import TokenStore
from recsys.trainer import (
    Trainer,
    TrainerConfig,
    load_checkpoint,
    make_optimiser,
    save_checkpoint,
    scheduled_rate,
)

_NUM_ITEMS = 20


def _cycles(num_users=60, length=12):
    """Every user walks round a circle of items, so that the next item is certain."""
    starts = np.arange(num_users)[:, None]
    items = 2 + (starts + np.arange(length)) % _NUM_ITEMS
    return TokenStore(
        user_ids=pa.array(range(num_users)),
        offsets_U=np.arange(num_users + 1, dtype=np.int64) * length,
        items_T=items.astype(np.int32).ravel(),
        context_TF=np.zeros((num_users * length, 0), np.uint8),
        timestamps_T=np.zeros(num_users * length, np.int64),
    )


def _trainer(recipe_name="bert4rec", *, store=None, loss=None, **config):
    store = store or _cycles()
    recipe = read_recipe(
        recipe_name,
        {
            "batch_size": 16,
            "model": {"dim": 32, "max_len": 12, "dropout": 0.1},
            "loss": loss or {},
            "optimiser": {"learning_rate": 5e-3},
        },
    )
    torch.manual_seed(0)
    model = NextItemModel(recipe.model, _NUM_ITEMS + 2, ())
    return Trainer(
        recipe,
        TrainerConfig(precision="fp32", **config),
        model,
        store,
        leave_one_out(store.offsets_U),
        np.zeros(0, bool),
        seed=0,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(
    ("recipe", "loss", "max_epochs"),
    [
        ("bert4rec", {}, 25),
        ("sasrec-ce", {}, 25),
        ("esasrec", {}, 25),
        # With a yes or no for each item they start late.
        ("sasrec", {}, 60),
        ("gsasrec", {"negatives": {"num": 5, "group_size": 11}}, 60),
    ],
)
def test_a_certain_next_item_is_learned(recipe, loss, max_epochs):
    trainer = _trainer(recipe, loss=loss, max_epochs=max_epochs)
    reports = [trainer.train_epoch() for _ in range(max_epochs)]
    assert reports[-1].loss < 0.8 * reports[0].loss
    # Ten items are left when those seen are out: at random NDCG@10 is 0.45.
    assert reports[-1].ndcg10 > 0.9


def test_a_resumed_run_ends_where_an_unbroken_one_ends(tmp_path):
    unbroken = _trainer(max_epochs=4)
    expected = [unbroken.train_epoch().loss for _ in range(4)]

    first = _trainer(max_epochs=4)
    losses = [first.train_epoch().loss for _ in range(2)]
    save_checkpoint(tmp_path, first)
    second = _trainer(max_epochs=4)
    load_checkpoint(tmp_path, second)
    losses += [second.train_epoch().loss for _ in range(2)]
    assert losses == expected


def test_training_stops_when_validation_no_longer_improves():
    trainer = _trainer(max_epochs=50, patience=1)
    trainer.best_ndcg10 = 2.0  # no NDCG reaches it
    trainer.train_epoch()
    assert trainer.should_stop


def test_epochs_between_validations_report_no_metric():
    trainer = _trainer(max_epochs=4, validate_every=2)
    assert [trainer.train_epoch().is_validated for _ in range(3)] == [False, True, False]


def test_nothing_to_learn_from_is_one_sentence():
    with pytest.raises(TrainingError, match=r"No user has two training events"):
        _trainer(store=_cycles(length=3))


def test_a_loss_that_is_not_finite_stops_the_run():
    trainer = _trainer()
    with torch.no_grad():
        trainer.model.item_bias.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"lower optimiser.learning_rate"):
        trainer.train_epoch()


def test_the_rate_climbs_and_then_falls_to_its_final_share():
    config = OptimiserConfig(learning_rate=1.0, warmup_share=0.1, final_share=0.1)
    assert scheduled_rate(config, 0, 100) == pytest.approx(1 / 11)
    assert scheduled_rate(config, 10, 100) == pytest.approx(1.0)
    assert scheduled_rate(config, 55, 100) == pytest.approx(0.1 + 0.9 / 2)  # half of the cosine
    assert scheduled_rate(config, 100, 100) == pytest.approx(0.1)


def test_only_matrices_of_linear_layers_decay():
    trainer = _trainer()
    decayed, kept = make_optimiser(trainer.model, OptimiserConfig()).param_groups
    assert decayed["weight_decay"] > 0
    assert kept["weight_decay"] == 0
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert any(parameter is trainer.model.items.weight for parameter in kept["params"])

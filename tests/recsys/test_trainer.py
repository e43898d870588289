"""The training loop on a store that a model can learn by heart."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.batches import Batch
from recsys.errors import TrainingError
from recsys.model import NextItemModel
from recsys.recipe import OptimiserConfig, read_recipe
from recsys.splits import SplitConfig, leave_one_out, split_tokens
from recsys.targets import TargetEvents
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


def _trainer(recipe_name="bert4rec", *, store=None, loss=None, data=None, **config):
    store = store or _cycles()
    data = {"split": leave_one_out(store.offsets_U), **(data or {})}
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
    num_fields = store.context_TF.shape[1]
    model = NextItemModel(recipe.model, _NUM_ITEMS + 2, (3,) * num_fields)
    return Trainer(
        recipe,
        TrainerConfig(precision="fp32", **config),
        model,
        store,
        known_at_request_F=np.zeros(num_fields, bool),
        seed=0,
        device=torch.device("cpu"),
        **data,
    )


@pytest.mark.parametrize(
    ("recipe", "loss", "max_epochs"),
    [
        ("bert4rec", {}, 25),
        ("sasrec-ce", {}, 25),
        ("esasrec", {}, 25),
        ("rss", {}, 40),
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


_PURCHASES = TargetEvents(0, np.array([0, 0, 1], np.float32), is_weighted=False)


def _with_purchases(store, share=0.4):
    """The same events as views (1) and purchases (2)."""
    types_T = 1 + (np.random.default_rng(0).random(store.num_tokens) < share)
    return replace(store, context_TF=types_T[:, None].astype(np.uint8))


@pytest.mark.parametrize(
    ("recipe", "ndcg10"),
    # Recency sampling also asks for purchases that views follow, which no order makes certain.
    [("bert4rec", 0.9), ("sasrec-ce", 0.9), ("rss", 0.75)],
)
def test_purchases_alone_are_learned_and_validated(recipe, ndcg10):
    store = _with_purchases(_cycles(num_users=100))
    split = split_tokens(store, SplitConfig(), _PURCHASES)
    data = {"split": split, "targets": _PURCHASES}
    trainer = _trainer(recipe, store=store, data=data, max_epochs=60, validate_every=60)
    reports = [trainer.train_epoch() for _ in range(60)]
    assert reports[-1].ndcg10 > ndcg10


def test_an_item_that_was_viewed_can_be_the_target_where_seen_items_stay():
    # Everybody walks the circle twice: the target was seen on the first round.
    store = _cycles(length=30)
    kept = _trainer("sasrec-ce", store=store, data={"filter_seen": False})
    assert kept.validate()[1] > 0
    assert _trainer("sasrec-ce", store=store).validate() == (0, 0)


def test_the_loss_of_an_epoch_is_weighted_over_batches():
    # All weights are twice as large: the mean stays.
    store = _with_purchases(_cycles())
    losses = [
        _trainer(store=store, data={"targets": TargetEvents(0, weights_V, is_weighted=True)})
        .train_epoch()
        .loss
        for weights_V in (np.array([0, 1, 3], np.float32), np.array([0, 2, 6], np.float32))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(_trainer(store=store).train_epoch().loss, rel=1e-4)


def test_a_rank_counts_as_much_as_its_scored_positions_weigh(monkeypatch):
    trainer = _trainer()
    trainer.world_size = 2
    monkeypatch.setattr("recsys.trainer._sum_over_ranks", lambda values, device: [8.0])
    batch = Batch(*[torch.zeros(3)] * 6, weights_M=torch.tensor([3.0, 2.0, 1.0]))
    assert trainer._weight_of(batch) == 6 * 2 / 8
    assert trainer._weight_of(replace(batch, weights_M=None)) == 3 * 2 / 8


def test_what_the_batch_brings_is_expected_as_often_as_it_is_a_target():
    store = _with_purchases(_cycles(num_users=1, length=12))  # one user walks ten training events
    store.context_TF[:] = [[1]] * 4 + [[2]] * 2 + [[1]] * 6
    split = leave_one_out(store.offsets_U)
    loss = {"negatives": {"source": "in-batch", "group_size": None}}
    data = {"split": split, "targets": _PURCHASES}
    trainer = _trainer("esasrec", store=store, loss=loss, data=data)
    drawn = trainer._sampler.draw(torch.tensor([6, 7]), torch.Generator())
    # Items 6 and 7 are the two targets: each is expected once among two.
    assert drawn.log_expected_GN.tolist() == [[0.0, 0.0]]


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

"""The training loop on a store that a model can learn by heart."""

import math
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.checkpoint import load_checkpoint, save_checkpoint
from recsys.errors import OutOfMemoryError, TrainingError
from recsys.model import NextItemModel
from recsys.negatives import BatchTargets
from recsys.optimiser import Optimiser, OptimiserConfig, scheduled_rate
from recsys.randomness import Draws
from recsys.recipe import read_recipe
from recsys.splits import SplitConfig, leave_one_out, split_tokens
from recsys.targets import TargetEvents
from recsys.tokens import TokenStore
from recsys.trainer import Trainer, TrainerConfig

_NUM_ITEMS = 20
NUM_ROWS = _NUM_ITEMS + 2


def cycles(num_users=60, length=12):
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


def make_trainer(
    recipe_name="bert4rec",
    *,
    store=None,
    overrides=None,
    data=None,
    batch_size=16,
    seed=0,
    precision="fp32",
    features=None,
    **config,
):
    """A trainer; `overrides` are sections of the recipe, `config` is the trainer's."""
    store, overrides = store or cycles(), overrides or {}
    data = {"split": leave_one_out(store.offsets_U), **(data or {})}
    recipe = read_recipe(
        recipe_name,
        {
            "batch_size": batch_size,
            "optimiser": {"learning_rate": 5e-3},
            **overrides,
            "model": {"dim": 32, "max_len": 12, "dropout": 0.1} | overrides.get("model", {}),
        },
    )
    torch.manual_seed(0)
    num_fields = store.context_TF.shape[1]
    network = NextItemModel(recipe.model, NUM_ROWS, (3,) * num_fields, features)
    return Trainer(
        recipe,
        TrainerConfig(precision=precision, **config),
        network,
        store,
        known_at_request_F=np.zeros(num_fields, bool),
        seed=seed,
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
    trainer = make_trainer(recipe, overrides={"loss": loss}, max_epochs=max_epochs)
    reports = [trainer.train_epoch() for _ in range(max_epochs)]
    assert reports[-1].loss < 0.8 * reports[0].loss
    # Ten items are left when those seen are out: at random NDCG@10 is 0.45.
    assert reports[-1].ndcg10 > 0.9


@pytest.mark.parametrize(
    ("recipe", "objective", "num_seen"),
    [
        # Nine places of ten events are asked for the next one, and see one to nine items.
        ("sasrec-ce", {}, range(1, 10)),
        ("bert4rec", {"last_prob": 1.0}, [9]),
    ],
)
def test_a_loss_may_leave_out_what_its_positions_see(recipe, objective, num_seen):
    def first_loss(*, exclude_seen):
        overrides = {
            "loss": {"exclude_seen": exclude_seen},
            "objective": objective,
            "optimiser": {"learning_rate": 1e-9},
        }
        return make_trainer(recipe, overrides=overrides, max_epochs=1).train_epoch().loss

    # An untrained model holds all items that take part for about as likely.
    unseen = np.mean([math.log(_NUM_ITEMS - num) for num in num_seen])
    assert first_loss(exclude_seen=True) == pytest.approx(unseen, abs=0.03)
    assert first_loss(exclude_seen=False) == pytest.approx(math.log(_NUM_ITEMS), abs=0.03)


PURCHASES = TargetEvents(0, np.array([0, 0, 1], np.float32), is_weighted=False)


def with_purchases(store, share=0.4):
    """The same events as views (1) and purchases (2)."""
    types_T = 1 + (np.random.default_rng(0).random(store.num_tokens) < share)
    return replace(store, context_TF=types_T[:, None].astype(np.uint8))


@pytest.mark.parametrize(
    ("recipe", "ndcg10"),
    # Recency sampling also asks for purchases that views follow, which no order makes certain.
    [("bert4rec", 0.9), ("sasrec-ce", 0.9), ("rss", 0.75)],
)
def test_purchases_alone_are_learned_and_validated(recipe, ndcg10):
    store = with_purchases(cycles(num_users=100))
    split = split_tokens(store, SplitConfig(), PURCHASES)
    data = {"split": split, "targets": PURCHASES}
    trainer = make_trainer(recipe, store=store, data=data, max_epochs=60, validate_every=60)
    reports = [trainer.train_epoch() for _ in range(60)]
    assert reports[-1].ndcg10 > ndcg10


def test_an_item_that_was_viewed_can_be_the_target_where_seen_items_stay():
    # Everybody walks the circle twice: the target was seen on the first round.
    store = cycles(length=30)
    kept = make_trainer("sasrec-ce", store=store, data={"filter_seen": False})
    assert kept.validate()[1] > 0
    assert make_trainer("sasrec-ce", store=store).validate() == (0, 0)


def test_a_validation_tells_its_standard_error():
    trainer = make_trainer(max_epochs=2, validate_every=2)
    first, second = trainer.train_epoch(), trainer.train_epoch()
    assert math.isnan(first.ndcg10_error)
    # Gains lie between 0 and 1: a mean m has an error of sqrt(m * (1 - m) / n) at most.
    num_users = trainer._validation_users.size
    largest = math.sqrt(second.ndcg10 * (1 - second.ndcg10) / num_users)
    assert 0 < second.ndcg10_error <= largest


def test_the_loss_of_an_epoch_is_weighted_over_batches():
    # All weights are twice as large: the mean stays.
    store = with_purchases(cycles())
    losses = [
        make_trainer(store=store, data={"targets": TargetEvents(0, weights_V, is_weighted=True)})
        .train_epoch()
        .loss
        for weights_V in (np.array([0, 1, 3], np.float32), np.array([0, 2, 6], np.float32))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(make_trainer(store=store).train_epoch().loss, rel=1e-4)


def test_what_the_batch_brings_is_expected_as_often_as_it_is_a_target():
    store = with_purchases(cycles(num_users=1, length=12))  # one user walks ten training events
    store.context_TF[:] = [[1]] * 4 + [[2]] * 2 + [[1]] * 6
    split = leave_one_out(store.offsets_U)
    loss = {"negatives": {"source": "in-batch", "group_size": None}}
    data = {"split": split, "targets": PURCHASES}
    trainer = make_trainer("esasrec", store=store, overrides={"loss": loss}, data=data)
    targets = torch.tensor([6, 7])
    drawn = trainer._assembler.sampler.draw(targets, Draws(0, 0, targets), BatchTargets(targets))
    # Items 6 and 7 are the two targets: each is expected once among two.
    assert drawn.log_expected_GN.tolist() == [[0.0, 0.0]]


_KINDS = {
    "bert4rec": {"objective": {"random_share": 0.1, "kept_share": 0.1}},
    "sasrec-ce": {},
    "rss": {},
    "gsasrec": {"loss": {"negatives": {"num": 5, "group_size": 7}}},
}


def _weights(trainer):
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


def weights_that_matter(trainer):
    """All but the biases of keys: a softmax does not see them, so that their gradients are what
    rounding leaves of 0, and Adam scales that up.
    """
    weights = _weights(trainer)
    for name, weight in weights.items():
        if name.endswith("qkv.bias"):
            _, keys, _ = weight.chunk(3)
            keys.zero_()
    return weights


@pytest.mark.parametrize(
    ("recipe", "precision"), [*((recipe, "fp32") for recipe in _KINDS), ("bert4rec", "bf16")]
)
def test_a_run_that_was_cut_off_within_an_epoch_ends_where_an_unbroken_one_ends(
    recipe, precision, tmp_path
):
    def make():
        return make_trainer(recipe, overrides=_KINDS[recipe], precision=precision, max_epochs=3)

    unbroken = make()
    expected = [unbroken.train_epoch() for _ in range(3)]

    class KilledError(Exception):
        pass

    first = make()

    def kill():
        if first.step == 2:
            first.add_up_progress()
            save_checkpoint(tmp_path, first)
        if first.step == 3:
            raise KilledError

    losses = [first.train_epoch().loss]
    with pytest.raises(KilledError):
        first.train_epoch(kill)
    second = make()
    load_checkpoint(tmp_path, second)
    assert (second.epoch, second.step) == (1, 2)
    losses += [second.train_epoch().loss for _ in range(2)]

    assert losses == [report.loss for report in expected]
    for name, weight in _weights(unbroken).items():
        assert torch.equal(weight, second.model.state_dict()[name]), name


def test_training_in_bf16_counts_in_bf16_and_learns_as_much():
    exact, short = (
        make_trainer("sasrec-ce", precision=precision, max_epochs=25, validate_every=25)
        for precision in ("fp32", "bf16")
    )
    reports = [[trainer.train_epoch() for _ in range(25)] for trainer in (exact, short)]
    assert reports[0][0].loss != reports[1][0].loss
    # bf16 has eight bits: 0.4 % of each number.
    assert reports[1][0].loss == pytest.approx(reports[0][0].loss, rel=4e-3)
    assert reports[1][-1].ndcg10 > 0.9
    assert all(parameter.dtype == torch.float32 for parameter in short.model.parameters())


@pytest.mark.parametrize("source", ["uniform", "mixed"])
@pytest.mark.parametrize("recipe", ["bert4rec", "esasrec"])
def test_parts_of_a_batch_add_up_to_the_whole(recipe, source):
    loss = {"kind": "sampled-softmax", "negatives": {"source": source, "num": 4}}
    loss["negatives"]["group_size"] = 5 if source == "uniform" else None
    whole, parts = (
        make_trainer(recipe, overrides={"loss": loss}, micro_batches=number, batch_size=18)
        for number in (1, 4)
    )
    assert whole.train_epoch().loss == pytest.approx(parts.train_epoch().loss, rel=1e-6)
    other = weights_that_matter(parts)
    for name, weight in weights_that_matter(whole).items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=2e-4)


_NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee also ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
)


@pytest.mark.parametrize("error", _NO_MEMORY)
def test_a_step_that_does_not_fit_names_the_settings_that_would(error, monkeypatch):
    trainer = make_trainer(batch_size=18)
    monkeypatch.setattr(trainer, "_loss", Mock(side_effect=error))
    with pytest.raises(OutOfMemoryError) as raised:
        trainer.train_epoch()
    message = str(raised.value)
    assert message.startswith("Worker 0 ran out of memory in step 1 of epoch 1 (")
    assert "\n" not in message
    assert message.endswith(
        "raise trainer.micro_batches to 2 (now 1), which changes no result, or lower batch_size "
        "to 9 (now 18) in a new run."
    )
    # Half of the batch would leave parts without a window.
    trainer = make_trainer(batch_size=18, micro_batches=18)
    monkeypatch.setattr(trainer, "_loss", Mock(side_effect=error))
    with pytest.raises(OutOfMemoryError, match=r"; train a smaller model\.$"):
        trainer.train_epoch()


@pytest.mark.parametrize("error", _NO_MEMORY)
def test_a_validation_that_does_not_fit_says_so(error, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer, "_validation", Mock(rank=Mock(side_effect=error)))
    with pytest.raises(OutOfMemoryError, match=r"^Worker 0 ran out .* the validation of epoch 1 "):
        trainer.train_epoch()


def test_other_errors_of_a_step_stay_what_they_are(monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer, "_loss", Mock(side_effect=RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer.train_epoch()


def test_a_batch_that_is_too_small_to_be_shared_is_refused():
    with pytest.raises(TrainingError, match=r"2 windows cannot be shared by 1 workers in 3 parts"):
        make_trainer(batch_size=2, micro_batches=3)


def test_only_new_events_are_learned_and_old_ones_are_read():
    store = cycles(num_users=4, length=12)
    store.timestamps_T[:] = 1_000_000 * (1_000 + np.tile(np.arange(12), 4))
    store.timestamps_T[:12] -= 500_000_000  # nothing new of the first user
    trainer = make_trainer("sasrec-ce", store=store, data={"new_since_s": 1_006}, batch_size=3)
    (places,) = trainer._assembler.windows.batches(3, 0)
    assert sorted(places.starts_B.tolist()) == [12, 24, 36]
    (piece,) = trainer._assembler.assemble(places, 0)
    # Training events are those of the seconds 1,000 to 1,009.
    assert piece.batch.items_BL.shape == (3, 9)
    assert sorted((piece.batch.scored_M % 9).tolist()) == [5] * 3 + [6] * 3 + [7] * 3 + [8] * 3
    with pytest.raises(TrainingError, match="or none of them is new"):
        make_trainer(store=store, data={"new_since_s": 2_000})


def test_item_codes_that_nobody_loaded_are_refused(tmp_path):
    overrides = {"model": {"item_codes": {"length": 4}, "separate_output": True}}
    trainer = make_trainer(overrides=overrides)
    with pytest.raises(TrainingError, match=r"nobody learned them, .* model.load_codes"):
        trainer.train_epoch()
    trainer.model.load_codes(torch.zeros(_NUM_ITEMS + 2, 4, dtype=torch.uint8))
    trainer.train_epoch()

    save_checkpoint(tmp_path, trainer)
    resumed = make_trainer(overrides=overrides)
    load_checkpoint(tmp_path, resumed)
    resumed.train_epoch()


def test_training_stops_when_validation_no_longer_improves():
    trainer = make_trainer(max_epochs=50, patience=1)
    trainer.best_ndcg10 = 2.0  # no NDCG reaches it
    trainer.train_epoch()
    assert trainer.should_stop


def test_epochs_between_validations_report_no_metric():
    trainer = make_trainer(max_epochs=4, validate_every=2)
    assert [trainer.train_epoch().is_validated for _ in range(3)] == [False, True, False]


def test_nothing_to_learn_from_is_one_sentence():
    with pytest.raises(TrainingError, match=r"No user has two training events"):
        make_trainer(store=cycles(length=3))


def _break(trainer):
    with torch.no_grad():
        trainer.model.item_bias[5] = math.nan


def test_a_loss_that_is_not_finite_stops_the_run_within_the_epoch():
    trainer = make_trainer()
    _break(trainer)
    with pytest.raises(TrainingError, match=r"The loss of epoch 1 is nan; lower optimiser.learn"):
        trainer.train_epoch()
    assert trainer.step == 1 < trainer.steps_per_epoch  # the first look comes after the first step


@pytest.mark.parametrize("broken", ["weight", "moment"])
def test_weights_that_are_not_finite_are_neither_kept_nor_validated(broken, tmp_path):
    trainer = make_trainer()
    trainer.train_epoch()
    save_checkpoint(tmp_path, trainer)
    kept = sorted(path.name for path in tmp_path.iterdir())
    if broken == "weight":
        _break(trainer)
    else:
        moments = trainer._optimiser.parts[0].state[trainer.model.item_bias]
        moments["exp_avg_sq"][3] = math.inf
    message = r"after step 0 of epoch 2 are not finite; lower optimiser.learning_rate \(now 0.005\)"
    with pytest.raises(TrainingError, match=message):
        save_checkpoint(tmp_path, trainer)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    trainer._progress.started = 0.0
    with pytest.raises(TrainingError, match=message):
        trainer.add_up_progress()


def test_a_last_step_that_breaks_the_weights_is_found_before_validation():
    trainer = make_trainer()

    def break_at_the_end():
        if trainer.step == trainer.steps_per_epoch:
            _break(trainer)

    with pytest.raises(TrainingError, match=r"Weights .* are not finite"):
        trainer.train_epoch(break_at_the_end)


def test_a_validation_without_numbers_is_an_error_of_the_training():
    trainer = make_trainer()
    _break(trainer)
    with pytest.raises(TrainingError, match=r"scores that are not numbers; lower optimiser.learn"):
        trainer.validate()


def test_progress_within_an_epoch_is_told_and_changes_nothing():
    told, weights = {}, {}
    for seconds in (1e-9, 1e9):
        trainer = make_trainer(max_epochs=2, report_every_seconds=seconds)
        news = told[seconds] = []
        for _ in range(2):
            trainer.train_epoch(lambda news=news, trainer=trainer: news.append(trainer.news))
        weights[seconds] = _weights(trainer)
    steps = [(report["epoch"], report["step"]) for report in told[1e-9] if report]
    last = trainer.steps_per_epoch
    # Of the last step the report of the epoch tells.
    assert steps == [(epoch, step) for epoch in (0, 1) for step in range(1, last)]
    assert told[1e-9][0]["steps"] == last > 2
    assert told[1e-9][0]["loss"] > 0 < told[1e-9][0]["tokens_per_s"]
    assert told[1e9] == [None] * (2 * last)
    assert all(torch.equal(weight, weights[1e9][name]) for name, weight in weights[1e-9].items())


def test_the_rate_climbs_and_then_falls_to_its_final_share():
    config = OptimiserConfig(learning_rate=1.0, warmup_share=0.1, final_share=0.1)
    assert scheduled_rate(config, 0, 100) == pytest.approx(1 / 11)
    assert scheduled_rate(config, 10, 100) == pytest.approx(1.0)
    assert scheduled_rate(config, 55, 100) == pytest.approx(0.1 + 0.9 / 2)  # half of the cosine
    assert scheduled_rate(config, 100, 100) == pytest.approx(0.1)


def test_the_optimiser_is_fused_and_only_matrices_of_linear_layers_decay():
    trainer = make_trainer()
    (part,) = Optimiser(trainer.model, OptimiserConfig()).parts
    assert isinstance(part, torch.optim.AdamW)
    decayed, kept = part.param_groups
    assert decayed["fused"] is kept["fused"] is True
    assert decayed["weight_decay"] > 0
    assert kept["weight_decay"] == 0
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert any(parameter is trainer.model.items.weight for parameter in kept["params"])

"""What a training will hold in memory."""

from dataclasses import replace

import pytest
import torch

from recsys.errors import TrainingError
from recsys.memory_plan import Workload, plan_memory, refuse_what_cannot_fit
from recsys.recipe import read_recipe

_LOAD = Workload(
    num_rows=100_000, num_tokens=1_000_000, context_sizes=(), windows=32, dtype=torch.float32
)
_WIDE = {"model": {"dim": 256, "num_heads": 4}}


def test_weights_moments_and_gradients_are_counted_by_hand():
    recipe = read_recipe("sasrec-ce", {"model": {"dim": 64}})
    parts = plan_memory(recipe, _LOAD).parts
    # Two blocks of 12 D^2 + 13 D, positions, the last norm, and a vector and a bias an item.
    encoder = 2 * (12 * 64**2 + 13 * 64) + 50 * 64 + 2 * 64
    weights = encoder + 100_000 * 65
    assert parts["weights"] == 4 * weights
    assert parts["moments"] == 8 * weights
    assert parts["gradients"] == 4 * weights
    assert parts["tokens"] == 8_000_000


def test_rows_that_are_touched_alone_have_no_gradient_of_the_table():
    sampled = read_recipe("esasrec", {"optimiser": {"item_rows": "touched"}})
    every = read_recipe("esasrec")
    before, after = (plan_memory(recipe, _LOAD).parts for recipe in (every, sampled))
    assert before["gradients"] - after["gradients"] == 4 * 100_000 * 65
    # Copies of the rows of a step take their place: a vector and a bias, and the gradient of both.
    assert after["touched"] < 2 * 4 * 65 * 100_000
    assert (before["touched"], after["touched"] % (2 * 4 * 65)) == (0, 0)


def test_negatives_of_the_batch_are_compared_with_all_of_its_positions():
    negatives = {"source": "mixed", "num": 1_000}
    loss = {"kind": "sampled-softmax", "negatives": negatives}
    recipe = read_recipe("sasrec-ce", {"loss": loss, "batch_size": 64})
    # 50 positions of each of 32 windows, and the targets of a batch of 64 beside those drawn.
    M, N = 32 * 50, 1_000 + 64 * 50
    parts = plan_memory(recipe, _LOAD).parts
    assert parts["loss"] == 4 * N * recipe.model.dim + 21 * M * N
    sparse = read_recipe("sasrec-ce", {"loss": {"kind": "sampled-softmax"}, "batch_size": 64})
    # The default: 256 uniform ones for all.
    assert plan_memory(sparse, _LOAD).parts["loss"] == 4 * 256 * recipe.model.dim + 21 * M * 256


def test_vectors_of_many_draws_and_their_gradient_outweigh_the_scores():
    negatives = {"source": "uniform", "num": 8, "group_size": 1}
    recipe = read_recipe("sasrec-ce", {"loss": {"kind": "bce", "negatives": negatives}})
    M, N = 32 * 50, 8
    of_vectors = 8 * M * N * recipe.model.dim
    assert plan_memory(recipe, _LOAD).parts["loss"] == of_vectors + 9 * M * N


def test_several_workers_hold_gradients_twice():
    recipe = read_recipe("sasrec-ce")
    alone, together = (
        plan_memory(recipe, replace(_LOAD, num_workers=number)).parts for number in (1, 4)
    )
    assert together == alone | {"gradients": 2 * alone["gradients"]}


@pytest.mark.parametrize("recipe", ["bert4rec", "sasrec-ce", "gsasrec", "rss"])
def test_activations_grow_with_the_windows(recipe):
    one, two = (
        plan_memory(read_recipe(recipe), replace(_LOAD, windows=windows)).parts["activations"]
        for windows in (32, 64)
    )
    assert one > 32 * 50 * 64 * 4  # more than the states of one layer
    assert two == pytest.approx(2 * one, rel=0.2)


def test_what_fits_is_planned():
    recipe = read_recipe("sasrec-ce")
    plan = refuse_what_cannot_fit(recipe, _LOAD, 2**33)
    assert plan == plan_memory(recipe, _LOAD)
    assert str(plan).startswith(f"{plan.total_bytes / 1e9:.2f} GB (weights 0.03, moments 0.05")


def test_what_cannot_fit_is_refused_with_two_settings_that_would():
    load = replace(_LOAD, num_rows=2_000_000)
    recipe = read_recipe("sasrec-ce", _WIDE)
    with pytest.raises(TrainingError) as refused:
        refuse_what_cannot_fit(recipe, load, 8 * 10**9)
    message = str(refused.value)
    assert "where 8.00 GB are free" in message
    assert "loss.kind = 'sampled-softmax' with optimiser.item_rows = 'touched' (" in message
    assert "or model.item_codes = { length = 8 } (" in message


def test_what_nothing_helps_is_said():
    with pytest.raises(TrainingError, match="nothing that can be set would make it fit"):
        refuse_what_cannot_fit(read_recipe("sasrec-ce", _WIDE), _LOAD, 1_000)

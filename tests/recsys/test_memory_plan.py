"""What a training will hold in memory."""

from dataclasses import replace

import pytest
import torch

from recsys.memory_plan import Workload, plan_memory
from recsys.recipe import read_recipe

_LOAD = Workload(num_rows=100_000, num_tokens=1_000_000, context_sizes=(), dtype=torch.float32)


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
    # That of targets is there beside the one that has been added up so far.
    assert before["gradients"] - after["gradients"] == 2 * 4 * 100_000 * 65
    # The rows of 128 windows, of their targets and of 256 negatives for each take their place: a
    # vector and a bias, copied, their gradients, and five more that a lazy Adam makes of these.
    rows = 128 * 51 + 128 * 256
    assert (before["touched"], after["touched"]) == (0, 7 * 4 * 65 * rows)


def test_rows_of_all_parts_of_a_batch_are_held_and_those_of_all_workers_gathered():
    recipe = read_recipe("esasrec", {"optimiser": {"item_rows": "touched"}})
    many = replace(_LOAD, num_rows=10**6)
    whole, parts, workers = (
        plan_memory(recipe, load).parts["touched"]
        for load in (many, replace(many, micro_batches=4), replace(many, num_workers=2))
    )
    assert parts == whole
    # A worker copies the rows of half of the windows, gathers all and has gradients of all.
    assert workers == whole // 14 * (1 + 2 + 2 * 6)


def test_a_full_softmax_scales_a_gradient_beside_that_of_the_part_before():
    recipe = read_recipe("sasrec-ce", {"batch_size": 64})
    bf16 = replace(_LOAD, dtype=torch.bfloat16)
    one, two = (
        plan_memory(recipe, replace(bf16, micro_batches=number)).parts["loss"] for number in (1, 2)
    )
    # Of 64 positions at least the logits and their softmax.
    assert one == 100_000 * 64 * (4 + 2) + 2 * 2 * 64 * 100_002 - 2 * 2 * 64 * 2
    assert two - one == 100_000 * 64 * 2


def test_logits_are_those_of_the_scored_positions_at_most():
    recipe = read_recipe("sasrec-ce", {"batch_size": 2})
    small = replace(_LOAD, num_rows=1_000, is_cuda=True)
    parts = plan_memory(recipe, small).parts
    assert parts["loss"] == 4 * 1_000 * recipe.model.dim + 2 * 4 * 100 * 1_000


def test_negatives_of_the_batch_are_compared_with_all_of_its_positions():
    negatives = {"source": "mixed", "num": 1_000}
    loss = {"kind": "sampled-softmax", "negatives": negatives}
    recipe = read_recipe("sasrec-ce", {"loss": loss, "batch_size": 64})
    # 50 positions of each of 32 windows, and the targets of a batch of 64 beside those drawn.
    M, N = 32 * 50, 1_000 + 64 * 50
    halves = replace(_LOAD, micro_batches=2)
    parts = plan_memory(recipe, halves).parts
    assert parts["loss"] == 4 * N * recipe.model.dim + 21 * M * N
    sparse = read_recipe("sasrec-ce", {"loss": {"kind": "sampled-softmax"}, "batch_size": 64})
    # The default: 256 uniform ones for all.
    assert plan_memory(sparse, halves).parts["loss"] == 4 * 256 * recipe.model.dim + 21 * M * 256


def test_vectors_of_many_draws_and_their_gradient_outweigh_the_scores():
    negatives = {"source": "uniform", "num": 8, "group_size": 1}
    loss = {"kind": "bce", "negatives": negatives}
    recipe = read_recipe("sasrec-ce", {"loss": loss, "batch_size": 32})
    M, N = 32 * 50, 8
    of_vectors = 8 * M * N * recipe.model.dim
    assert plan_memory(recipe, _LOAD).parts["loss"] == of_vectors + 9 * M * N


def test_several_workers_hold_gradients_twice():
    recipe = read_recipe("sasrec-ce", {"batch_size": 64})
    alone, together = (
        plan_memory(recipe, replace(_LOAD, **parts)).parts
        for parts in ({"micro_batches": 4}, {"num_workers": 4})
    )
    assert together["gradients"] == 2 * alone["gradients"]
    assert together["activations"] == alone["activations"]


@pytest.mark.parametrize("recipe", ["bert4rec", "sasrec-ce", "gsasrec", "rss"])
def test_activations_grow_with_the_batch_and_shrink_with_its_parts(recipe):
    one, two, halves = (
        plan_memory(
            read_recipe(recipe, {"batch_size": size}), replace(_LOAD, micro_batches=parts)
        ).parts["activations"]
        for size, parts in ((32, 1), (64, 1), (64, 2))
    )
    assert one > 32 * 50 * 64 * 4  # more than the states of one layer
    assert two == pytest.approx(2 * one, rel=1e-6)
    assert halves == one


def test_gradients_of_sampled_rows_wait_beside_those_of_an_earlier_part():
    recipe = read_recipe("esasrec")
    one, two = (
        plan_memory(recipe, replace(_LOAD, micro_batches=number)).parts["gradients"]
        for number in (1, 2)
    )
    assert two - one == 4 * 100_000 * 65


def test_a_validation_needs_scores_of_users_instead_of_a_step():
    recipe = read_recipe("sasrec-ce", {"batch_size": 1})
    load = replace(_LOAD, dtype=torch.bfloat16, is_cuda=True)
    alone, shared = (
        plan_memory(recipe, replace(load, validation_users=number, num_workers=workers)).parts
        for number, workers in ((5_000, 1), (600, 2))
    )
    of_step = sum(alone[name] for name in ("gradients", "loss", "activations"))
    # Of 512 users at most.
    assert alone["validation"] == 100_000 * 512 * 4 - of_step
    more_gradients = shared["gradients"] - alone["gradients"]
    assert shared["validation"] == 100_000 * 300 * 4 - of_step - more_gradients
    assert plan_memory(recipe, load).parts["validation"] == 0


def test_the_heap_of_a_cpu_is_planned_with_a_margin():
    recipe = read_recipe("sasrec-ce")
    cpu, gpu = (plan_memory(recipe, replace(_LOAD, is_cuda=on)).parts for on in (False, True))
    assert cpu["heap"] == cpu["loss"] + cpu["activations"]
    assert gpu["heap"] == 0

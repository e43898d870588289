"""What is suggested where a training does not fit."""

import re
import tomllib
from dataclasses import replace

import pytest
import torch

from recsys.errors import TrainingError
from recsys.memory_advice import refuse_what_cannot_fit, suggest_settings
from recsys.memory_plan import Workload, plan_memory
from recsys.recipe import builtin_recipes, read_recipe

_LOAD = Workload(
    num_rows=100_000, num_tokens=1_000_000, context_sizes=(), dtype=torch.float32, is_cuda=True
)
_LARGE = replace(_LOAD, num_rows=2_000_000)
_WIDE = {"model": {"dim": 256, "num_heads": 4}}


def _configure(name, workload, suggestion):
    """What a recipe becomes when the lines of a suggestion are put into a configuration."""
    lines = str(suggestion).rpartition(" (")[0].replace(" with ", "\n")
    train = tomllib.loads(lines)["train"]
    recipe, trainer = read_recipe(name, train.get("overrides")), train.get("trainer", {})
    dtype = torch.bfloat16 if trainer.get("precision") == "bf16" else workload.dtype
    parts = trainer.get("micro_batches", workload.micro_batches)
    return recipe, replace(workload, dtype=dtype, micro_batches=parts)


@pytest.mark.parametrize(("share", "num_workers"), [(0.6, 1), (0.15, 3)])
@pytest.mark.parametrize("name", builtin_recipes())
def test_what_is_suggested_fits_when_it_is_configured(name, share, num_workers):
    recipe = read_recipe(name)
    workload = replace(_LOAD, num_workers=num_workers, has_bf16=True)
    available = int(share * plan_memory(recipe, workload).total_bytes)
    found = suggest_settings(recipe, workload, available)
    assert 1 <= len(found) <= 2
    for suggestion in found:
        other, load = _configure(name, workload, suggestion)
        assert plan_memory(other, load) == suggestion.plan
        assert plan_memory(other, load).total_bytes <= available
        assert other.batch_size >= load.micro_batches * num_workers


def test_what_fits_is_planned():
    recipe = read_recipe("sasrec-ce")
    plan = refuse_what_cannot_fit(recipe, _LOAD, 2**33)
    assert plan == plan_memory(recipe, _LOAD)
    assert str(plan).startswith(f"{plan.total_bytes / 1e9:.2f} GB (weights 0.03, moments 0.05")


def test_parts_of_a_batch_come_first_and_then_a_smaller_one():
    recipe = read_recipe("bert4rec-production", {"batch_size": 2048})
    with pytest.raises(TrainingError) as refused:
        refuse_what_cannot_fit(recipe, _LOAD, 5 * 10**9)
    message = str(refused.value)
    assert "where 5.00 GB are free; train.trainer.micro_batches = 4 (" in message
    assert " or train.overrides.batch_size = 512 (" in message
    assert message.endswith(" GB) would fit.")


def test_smaller_blocks_and_coarser_numbers_are_next_where_a_batch_has_no_more_parts():
    recipe = read_recipe("sasrec-ce", {"batch_size": 16})
    workload = replace(_LOAD, micro_batches=16, has_bf16=True)
    needed = plan_memory(recipe, workload).total_bytes
    found = suggest_settings(recipe, workload, int(0.95 * needed))
    assert [found.settings for found in found] == [
        {"train.overrides.loss.block_size": 16},
        {"train.trainer.precision": "bf16"},
    ]


def test_beside_the_only_setting_that_does_alone_others_are_named_together():
    recipe = read_recipe("sasrec-ce", _WIDE)
    alone, together = suggest_settings(recipe, _LARGE, 8 * 10**9)
    assert str(alone).startswith("train.overrides.model.item_codes = { length = 8 } (")
    assert str(together).startswith(
        'train.overrides.optimiser.item_rows = "touched" with '
        'train.overrides.loss = { kind = "sampled-softmax" } ('
    )


def test_two_settings_are_named_together_where_none_does_alone():
    recipe = read_recipe("sasrec-ce", _WIDE)
    (found,) = suggest_settings(recipe, _LARGE, 2 * 10**9)
    assert found.settings == {
        "train.overrides.loss": {"kind": "sampled-softmax"},
        "train.overrides.model.item_codes": {"length": 8},
    }


def test_a_sampled_loss_is_drawn_with_fewer_negatives():
    negatives = {"source": "uniform", "num": 4_096, "group_size": 1}
    recipe = read_recipe("gsasrec", {"loss": {"negatives": negatives}, "batch_size": 16})
    workload = replace(_LOAD, micro_batches=16)
    available = int(0.8 * plan_memory(recipe, workload).total_bytes)
    fewer, _ = suggest_settings(recipe, workload, available)
    assert fewer.settings == {"train.overrides.loss.negatives.num": 512}
    assert fewer.plan.total_bytes <= available
    # No more than has to be: half as many are tried after these.
    more = {**negatives, "num": 1_024}
    other = read_recipe("gsasrec", {"loss": {"negatives": more}, "batch_size": 16})
    assert plan_memory(other, workload).total_bytes > available


def test_a_model_that_has_weights_keeps_its_vectors():
    recipe = read_recipe("sasrec-ce", _WIDE)
    found = suggest_settings(recipe, replace(_LARGE, has_weights=True), 8 * 10**9)
    assert not any("train.overrides.model.item_codes" in one.settings for one in found)


def test_codes_are_not_advised_to_items_whose_own_vectors_begin_somewhere():
    recipe = read_recipe("sasrec-ce", {**_WIDE, "item_start": "spectral"})
    found = suggest_settings(recipe, _LARGE, 8 * 10**9)
    assert found
    assert not any("train.overrides.model.item_codes" in one.settings for one in found)


def test_that_nothing_fits_is_said_with_what_would_be_needed_at_least():
    recipe = read_recipe("sasrec-ce", _WIDE)
    with pytest.raises(TrainingError, match="use a larger device or a smaller model") as refused:
        refuse_what_cannot_fit(recipe, _LARGE, 10**7)
    needed = re.search(r"would still need (.*) GB", str(refused.value))
    least = round(float(needed[1]) * 1e9)
    assert suggest_settings(recipe, _LARGE, least - 10**7) == []
    assert suggest_settings(recipe, _LARGE, least + 10**7)

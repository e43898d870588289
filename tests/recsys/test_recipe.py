"""Recipes: the files that come with the package, and what does not fit."""

import pytest
from pydantic import ValidationError

from recsys.recipe import builtin_recipes, read_recipe

_MASKED_ITEM = {
    "kind": "masked-item",
    "mask_prob": 0.2,
    "last_prob": 0.2,
    # Of ten hidden positions eight show the mask.
    "random_share": 0.1,
    "kept_share": 0.1,
}
_FULL = {"kind": "full-softmax"}
_MANY_SHARED = {"source": "uniform", "num": 256, "group_size": 50}
_TRANSFORMER = {"attention": "causal", "block": "transformer", "separate_output": False}
_ADAM = {"weight_decay": 0.0}
_DEFINING = {
    "bert4rec": {
        "model": {"attention": "bidirectional", "block": "transformer"},
        "objective": _MASKED_ITEM,
        "loss": _FULL,
    },
    "bert4rec-production": {
        "model": {
            "attention": "bidirectional",
            "dim": 256,
            "num_layers": 4,
            "num_heads": 8,
            "max_len": 50,
        },
        "objective": _MASKED_ITEM,
        "loss": _FULL,
    },
    "sasrec": {
        "model": {**_TRANSFORMER, "num_heads": 1, "dropout": 0.2},
        "objective": {"kind": "next-item"},
        "loss": {"kind": "bce", "negatives": {"source": "uniform", "num": 1, "group_size": 1}},
        "optimiser": _ADAM,
    },
    "sasrec-ce": {
        "model": {**_TRANSFORMER, "num_heads": 1},
        "objective": {"kind": "next-item"},
        "loss": _FULL,
        "optimiser": _ADAM,
    },
    "gsasrec": {
        "model": {**_TRANSFORMER, "separate_output": True, "dim": 128, "dropout": 0.5},
        "objective": {"kind": "next-item"},
        "loss": {"kind": "gbce", "calibration": 0.75, "negatives": _MANY_SHARED},
        "optimiser": _ADAM,
    },
    "esasrec": {
        "model": {"attention": "causal", "block": "ligr", "separate_output": False},
        "objective": {"kind": "next-item"},
        "loss": {"kind": "sampled-softmax", "negatives": _MANY_SHARED},
        "optimiser": _ADAM,
    },
    "rss": {
        "model": _TRANSFORMER,
        "objective": {"kind": "recency-sampling", "recency": 0.8, "target_share": 0.2},
        "loss": _FULL,
        "optimiser": {**_ADAM, "betas": (0.9, 0.98)},
    },
    "time-aware": {
        "model": {**_TRANSFORMER, "relative_bias": True, "time_bias": True},
        "objective": {"kind": "next-item"},
        "loss": _FULL,
        "optimiser": _ADAM,
    },
}
"""What makes each recipe that recipe; a paper's settings, or the case study's sizes."""


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_recipe_that_comes_with_the_package_is_valid(name):
    assert read_recipe(name).name == name


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_recipe_is_what_its_name_says(name):
    recipe = read_recipe(name).model_dump()
    for section, values in _DEFINING[name].items():
        assert {key: recipe[section].get(key) for key in values} == values


def test_single_values_are_replaced():
    recipe = read_recipe("bert4rec", {"model": {"dim": 32}, "batch_size": 8})
    assert (recipe.model.dim, recipe.model.num_layers, recipe.batch_size) == (32, 2, 8)


def test_an_unknown_recipe_names_those_that_exist():
    with pytest.raises(ValueError, match=r"unknown recipe 'bert5rec'; there are: bert4rec"):
        read_recipe("bert5rec")


def test_an_unknown_key_is_an_error():
    with pytest.raises(ValidationError, match=r"model.width"):
        read_recipe("bert4rec", {"model": {"width": 64}})


def test_bidirectional_attention_is_not_trained_by_recency_sampling():
    with pytest.raises(ValidationError, match=r"learns masked-item, not recency-sampling"):
        read_recipe("rss", {"model": {"attention": "bidirectional"}})


def test_a_mask_is_not_learned_by_causal_attention():
    with pytest.raises(ValidationError, match=r"causal attention learns next-item or recency"):
        read_recipe("bert4rec", {"model": {"attention": "causal"}})


def test_a_section_of_another_kind_begins_anew():
    recipe = read_recipe("gsasrec", {"loss": {"kind": "full-softmax"}})
    assert "calibration" not in recipe.loss.model_fields_set
    assert read_recipe("gsasrec", {"loss": {"calibration": 0.5}}).loss.kind == "gbce"

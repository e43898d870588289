"""Recipes: the files that come with the package, and what does not fit."""

import pytest
from pydantic import ValidationError

from recsys.recipe import builtin_recipes, read_recipe


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_recipe_that_comes_with_the_package_is_valid(name):
    assert read_recipe(name).name == name


def test_the_production_recipe_has_the_sizes_of_the_case_study():
    model = read_recipe("bert4rec-production").model
    assert (model.dim, model.num_layers, model.num_heads, model.max_len) == (256, 4, 8, 50)


def test_single_values_are_replaced():
    recipe = read_recipe("bert4rec", {"model": {"dim": 32}, "batch_size": 8})
    assert (recipe.model.dim, recipe.model.num_layers, recipe.batch_size) == (32, 2, 8)


def test_an_unknown_recipe_names_those_that_exist():
    with pytest.raises(ValueError, match=r"unknown recipe 'bert5rec'; there are: bert4rec"):
        read_recipe("bert5rec")


def test_an_unknown_key_is_an_error():
    with pytest.raises(ValidationError, match=r"model.width"):
        read_recipe("bert4rec", {"model": {"width": 64}})


def test_the_recency_recipe_has_the_settings_of_the_paper():
    recipe = read_recipe("rss")
    objective = recipe.objective
    assert (objective.kind, objective.recency, objective.target_share) == (
        "recency-sampling",
        0.8,
        0.2,
    )
    assert recipe.optimiser.betas[1] == 0.98


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

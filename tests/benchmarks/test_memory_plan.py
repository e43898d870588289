"""Planned beside measured memory, on a catalogue that is trained in no time."""

import pytest

from benchmarks.memory_plan import KINDS, Case, measure, render


@pytest.mark.parametrize("kind", ["sampled softmax, 4 parts", "touched rows", "item codes"])
def test_what_was_planned_stands_beside_what_was_held(kind):
    case = Case(items=3_000, dim=16, batch_size=8)
    found = measure(case, kind)
    assert found["planned_bytes"] == sum(found["parts"].values()) > 0
    assert found["ratio"] == pytest.approx(
        found["planned_bytes"] / max(found["measured_bytes"], 1), rel=1e-2, abs=1e-3
    )


def test_every_kind_is_a_recipe_in_the_sizes_of_the_case():
    case = Case(items=100, dim=32, batch_size=16)
    for kind in KINDS:
        recipe = case.recipe(kind)
        assert (recipe.model.dim, recipe.batch_size) == (32, 16)


def test_the_record_says_how_good_the_plan_was():
    row = {"planned_bytes": 3 * 2**30, "measured_bytes": 2 * 2**30, "ratio": 1.5}
    row |= {"tokens_per_s": 1_234}
    text = render(Case(1_000_000, 128, 256), {"full softmax": {**row, "parts": {"weights": 2**30}}})
    assert "1,000,000 items x 128" in text
    assert "| full softmax | 3.00 | 2.00 | 1.50 | 1,234 | weights 1.00 |" in text

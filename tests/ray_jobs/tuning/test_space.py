"""Search spaces: what they hold, and what they refuse."""

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from ray_jobs.tuning.space import Parameter, Space, as_overrides

RATE = {"kind": "log-uniform", "low": 1e-4, "high": 1e-2}
LOSS = {"kind": "choice", "values": ["full-softmax", "gbce", "bce"]}
CALIBRATION = {"kind": "uniform", "low": 0.5, "high": 1.0, "when": {"loss.kind": ["gbce"]}}
NEGATIVES = {"kind": "integer", "low": 1, "high": 64, "when": {"loss.kind": ["gbce", "bce"]}}
WHOLE = {
    # Conditions may stand before what they depend on.
    "loss.calibration": CALIBRATION,
    "optimiser.learning_rate": RATE,
    "loss.kind": LOSS,
    "loss.negatives.num": NEGATIVES,
}


def space(parameters):
    return Space.of(TypeAdapter(dict[str, Parameter]).validate_python(parameters))


@pytest.fixture
def whole():
    return space(WHOLE)


def test_draws_hold_what_takes_part_and_nothing_else(whole):
    rng = np.random.default_rng(0)
    draws = [whole.sample(rng) for _ in range(200)]
    for values in draws:
        assert whole.check(values) == values
        assert ("loss.calibration" in values) == (values["loss.kind"] == "gbce")
        assert ("loss.negatives.num" in values) == (values["loss.kind"] != "full-softmax")
    assert {values["loss.kind"] for values in draws} == set(LOSS["values"])
    # Each power of ten alike: as many below 1e-3 as above, within three deviations of 100.
    below = sum(values["optimiser.learning_rate"] < 1e-3 for values in draws)
    assert abs(below - 100) < 3 * np.sqrt(200 / 4)


def test_whole_numbers_include_both_ends():
    layers = space({"model.num_layers": {"kind": "integer", "low": 1, "high": 3}})
    rng = np.random.default_rng(0)
    drawn = {layers.sample(rng)["model.num_layers"] for _ in range(100)}
    assert drawn == {1, 2, 3}


@pytest.mark.parametrize(
    ("proposed", "fault"),
    [
        ([], "a proposal is a mapping of paths, not \\[\\]"),
        ({"loss.kind": "bce", "loss.negatives.num": 3}, "optimiser.learning_rate is missing"),
        ({"loss.kind": "gbse"}, "loss.kind: 'gbse' is none of"),
        ({"loss.kind": "full-softmax", "optimiser.learning_rate": 1.0}, "1.0 is not between"),
        ({"loss.kind": "full-softmax", "optimiser.learning_rate": "1e-3"}, "is not a number"),
        ({"loss.kind": "full-softmax", "optimiser.learning_rate": True}, "True is not a number"),
        ({"optimiser.learning_rate": float("nan")}, "nan is not between"),
        ({"loss.kind": "full-softmax", "loss.calibration": 0.7}, "loss.calibration takes no part"),
        ({"loss.kind": "bce", "loss.negatives.num": 2.5}, "2.5 is not a whole number"),
        ({"loss.kind": ["bce"]}, "is none of"),
        ({"seed": 1}, "there is no 'seed'"),
    ],
)
def test_a_proposal_that_does_not_fit_is_refused_with_its_fault(whole, proposed, fault):
    with pytest.raises(ValueError, match=fault):
        whole.check(proposed)


def test_every_fault_of_a_proposal_is_named(whole):
    faults = (
        "there is no 'x'; optimiser.learning_rate is missing; "
        "loss.negatives.num: 0 is not between 1 and 64"
    )
    with pytest.raises(ValueError, match=f"^{faults}$"):
        whole.check({"loss.kind": "bce", "x": 1, "loss.negatives.num": 0})


def test_a_proposal_gets_the_types_of_the_space(whole):
    rate = {"optimiser.learning_rate": 1e-3}
    values = whole.check({**rate, "loss.kind": "bce", "loss.negatives.num": 8.0})
    assert repr(values["loss.negatives.num"]) == "8"


@pytest.mark.parametrize(
    ("parameters", "fault"),
    [
        ({"optimiser.rate": RATE}, r"there is no 'optimiser.rate' in a recipe; optimiser has: lea"),
        ({"lr": RATE}, "there is no 'lr' in a recipe; a recipe has: model, objective, loss"),
        ({"name": LOSS}, "there is no 'name' in a recipe"),
        ({"model": LOSS}, "'model' is a section of a recipe and no value; name one of its values"),
        ({"model.dim.x": LOSS}, "model.dim has: no parts"),
        ({"loss.calibration": CALIBRATION}, "depends on 'loss.kind', which is no choice"),
        (
            {"loss.kind": LOSS, "loss.calibration": CALIBRATION | {"when": {"loss.kind": ["x"]}}},
            "takes part when loss.kind is x, and loss.kind is one of",
        ),
        (
            {
                "loss.kind": LOSS | {"when": {"model.block": ["ligr"]}},
                "model.block": {
                    "kind": "choice",
                    "values": ["ligr"],
                    "when": {"loss.kind": ["bce"]},
                },
            },
            "loss.kind, model.block depend on each other",
        ),
    ],
)
def test_a_space_that_cannot_be_is_refused(parameters, fault):
    with pytest.raises(ValueError, match=fault):
        space(parameters)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "uniform", "low": 2, "high": 1},
        {"kind": "log-uniform", "low": 0, "high": 1},
        {"kind": "uniform", "low": 0, "high": float("inf")},
        {"kind": "integer", "low": 1, "high": 1},
        {"kind": "integer", "low": 1.5, "high": 3},
        {"kind": "choice", "values": []},
        {"kind": "choice", "values": [1, 1]},
        {"kind": "normal", "low": 1, "high": 2},
        {"kind": "uniform", "low": 1, "high": 2, "step": 1},
    ],
)
def test_a_parameter_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValidationError):
        space({"model.dropout": wrong})


def test_what_takes_no_part_takes_along_what_depends_on_it():
    chain = space(
        {
            "model.block": {"kind": "choice", "values": ["ligr", "transformer"]},
            "loss.kind": LOSS | {"when": {"model.block": ["ligr"]}},
            "loss.calibration": CALIBRATION,
        }
    )
    assert chain.active({"model.block": "transformer", "loss.kind": "gbce"}) == ["model.block"]


def test_a_grid_is_every_combination_once(whole):
    grid = list(whole.grid(2))
    # Of each rate: full-softmax alone, gbce with 2 * 2 values, bce with 2.
    assert len(grid) == 2 * (1 + 4 + 2)
    assert all(whole.check(values) == values for values in grid)
    assert len({tuple(sorted(values.items())) for values in grid}) == len(grid)


def test_ends_are_the_corners_of_each_choice(whole):
    ends = list(whole.ends())
    assert {"loss.kind": "gbce", "optimiser.learning_rate": 1e-2, "loss.calibration": 1.0} | {
        "loss.negatives.num": 64
    } in ends
    assert len(ends) == 2 * 3


def test_values_become_overrides_on_top_of_others():
    base = {"batch_size": 128, "model": {"dim": 32, "max_len": 20}}
    merged = as_overrides({"model.dim": 64, "loss.kind": "bce"}, "bert4rec", base)
    assert merged == {
        "batch_size": 128,
        "model": {"dim": 64, "max_len": 20},
        "loss": {"kind": "bce"},
    }
    assert base["model"]["dim"] == 32


def test_another_objective_or_loss_leaves_the_parameters_of_the_former_behind():
    base = {"objective": {"mask_prob": 0.35}, "loss": {"kind": "gbce", "calibration": 0.5}}
    values = {"model.attention": "causal", "objective.kind": "next-item", "loss.kind": "bce"}
    merged = as_overrides(values, "bert4rec", base)
    assert merged == {
        "model": {"attention": "causal"},
        "objective": {"kind": "next-item"},
        "loss": {"kind": "bce"},
    }
    same = {"objective.kind": "masked-item", "objective.last_prob": 0.5}
    kept = as_overrides(same, "bert4rec", base)["objective"]
    assert kept == {"kind": "masked-item", "mask_prob": 0.35, "last_prob": 0.5}

"""Searchers: each follows from the trials, and learns what it can learn."""

import numpy as np
import pytest
from pydantic import TypeAdapter

from ray_jobs.tuning.searchers import GridSearch, RandomSearch, TpeSearch, is_repeated
from ray_jobs.tuning.space import Parameter, Space
from tests.ray_jobs.tuning.made_up import trial

SPACE = Space.of(
    TypeAdapter(dict[str, Parameter]).validate_python(
        {
            "optimiser.learning_rate": {"kind": "log-uniform", "low": 1e-4, "high": 1e-1},
            "loss.kind": {"kind": "choice", "values": ["full-softmax", "gbce"]},
            "loss.calibration": {
                "kind": "uniform",
                "low": 0.0,
                "high": 1.0,
                "when": {"loss.kind": ["gbce"]},
            },
            "model.num_layers": {"kind": "integer", "low": 1, "high": 3},
        }
    )
)


def worth(values):
    """Best at a rate of 1e-2 with gbce."""
    distance = abs(np.log10(values["optimiser.learning_rate"]) + 2)
    return 0.5 - 0.1 * distance + 0.1 * (values["loss.kind"] == "gbce")


def run(searcher, num, *, failing=lambda values: False):
    trials = []
    for number in range(num):
        values = searcher.propose(trials).values
        is_bad = failing(values)
        ending = "failed" if is_bad else "finished"
        trials.append(
            trial(number, *([] if is_bad else [worth(values)]), ending=ending, values=values)
        )
    return trials


@pytest.mark.parametrize("searcher", [TpeSearch(SPACE, 3), RandomSearch(SPACE, 3)])
def test_the_same_trials_bring_the_same_proposal(searcher):
    trials = run(searcher, 14)
    assert searcher.propose(trials) == searcher.propose(list(trials))
    assert len({str(one.values) for one in trials}) == 14
    assert all(SPACE.check(one.values) == one.values for one in trials)


def test_tpe_finds_what_is_better():
    found = run(TpeSearch(SPACE, seed=1), 40)
    first = np.mean([one.objective for one in found[:10]])
    last = np.mean([one.objective for one in found[-10:]])
    assert last > first + 0.05


def test_tpe_keeps_away_from_what_fails():
    tried = run(RandomSearch(SPACE, 0), 30, failing=lambda values: values["loss.kind"] == "gbce")
    assert sum(one.ending == "failed" for one in tried) > 10
    proposed = [TpeSearch(SPACE, seed).propose(tried).values["loss.kind"] for seed in range(20)]
    assert proposed.count("gbce") <= 4


def test_tpe_takes_running_and_lost_trials():
    values = RandomSearch(SPACE, 0).propose([]).values
    trials = [
        trial(0, 0.1, values=values),
        trial(1, ending=None, values=values),
        trial(2, 0.2, ending="lost", values=values),
        trial(3, ending="cut-off", values=values),
    ]
    proposal = TpeSearch(SPACE, seed=0, num_random=1).propose(trials)
    assert proposal.origin == "tpe"
    assert SPACE.check(proposal.values) == proposal.values


def test_a_grid_ends_and_goes_on_where_it_was():
    searcher = GridSearch(SPACE, points=2)
    trials = []
    while (proposal := searcher.propose(trials)) is not None:
        trials.append(trial(len(trials), values=proposal.values))
    # Rate * layers, for full-softmax, and for gbce with two calibrations.
    assert len(trials) == 2 * 2 * (1 + 2)
    assert searcher.propose(trials[:5]).values == trials[5].values


def test_the_same_values_are_a_repetition():
    values = {"optimiser.learning_rate": 1e-3, "model.num_layers": 2}
    tried = [trial(0, values=values)]
    assert is_repeated(
        {"model.num_layers": 2, "optimiser.learning_rate": 1e-3 * (1 + 1e-12)}, tried
    )
    assert not is_repeated(values | {"model.num_layers": 3}, tried)
    assert not is_repeated({"model.num_layers": 2}, tried)

"""What a search leaves behind: a configuration, figures and a report."""

import json
import math
import tomllib

import numpy as np
import pytest

from ray_jobs.config import PipelineConfig
from ray_jobs.tuning.outcome import (
    Outcome,
    _explained,
    best_config,
    importances,
    to_toml,
    write_outcome,
)
from ray_jobs.tuning.verdict import judge
from tests.ray_jobs.tuning.made_up import trial
from tests.ray_jobs.tuning.test_searchers import SPACE

RATE = "optimiser.learning_rate"
OURS_SN = np.array([[1, 1, 5, 1], [1, 2, 3, 1]]).repeat(20, axis=1)
THEIRS_SN = np.array([[9, 9, 9, 20], [9, 20, 9, 9]]).repeat(20, axis=1)


def make_config(**sections):
    base = {
        "name": "tiny",
        "seed": 3,
        "storage": {"root": "$HOME/x"},
        "ingest": {"events": [{"path": "-", "format": "parquet", "columns": {}}]},
        "tune": {"space": {path: one.model_dump() for path, one in SPACE.parameters.items()}},
    }
    return PipelineConfig.model_validate(base | sections)


def make_outcome(trials, verdict=None, **sections):
    return Outcome("first", make_config(**sections), trials, 10, verdict)


def values(rate, kind="full-softmax", layers=2):
    of_gbce = {"loss.calibration": 0.5} if kind == "gbce" else {}
    return {RATE: rate, "loss.kind": kind, **of_gbce, "model.num_layers": layers}


TRIALS = [
    trial(0, 0.10, 0.20, 0.19, values=values(1e-3)),
    trial(1, 0.10, ending="stopped", values=values(1e-4, "gbce")),
    trial(2, ending="failed", values=values(1e-1), reason="The loss of epoch 1 is nan"),
    trial(3, 0.10, 0.30, 0.29, values=values(2e-3, layers=3), notes=("status 500",)),
    trial(4, ending=None, values=values(1e-2)),
]


def test_the_configuration_of_the_winner_is_read_as_it_was_but_for_its_values():
    storage = {
        "root": "$HOME/x",
        "options": {"AWS_SECRET_ACCESS_KEY": "hush", "AWS_REGION": 'eu "x"'},
    }
    train = {"overrides": {"batch_size": 64, "model": {"dim": 32}}, "name": "mine"}
    outcome = make_outcome(TRIALS, storage=storage, train=train)
    raw = tomllib.loads(best_config(outcome, TRIALS[3]))
    assert raw["train"] == {
        "overrides": {
            "batch_size": 64,
            "model": {"dim": 32, "num_layers": 3},
            "optimiser": {"learning_rate": 2e-3},
            "loss": {"kind": "full-softmax"},
        }
    }
    assert raw["storage"]["options"] == {
        "AWS_SECRET_ACCESS_KEY": "$AWS_SECRET_ACCESS_KEY",
        "AWS_REGION": 'eu "x"',
    }
    assert (raw["seed"], raw["storage"]["root"]) == (3, "$HOME/x")
    assert "tune" not in raw


def test_epochs_of_the_search_are_those_of_the_training():
    tune = {"space": make_config().model_dump(mode="json")["tune"]["space"], "max_epochs": 7}
    raw = tomllib.loads(best_config(make_outcome(TRIALS, tune=tune), TRIALS[0]))
    assert raw["train"]["trainer"]["max_epochs"] == 7


@pytest.mark.parametrize(
    "raw",
    [
        {"a": 1, "b": True, "c": 1e-05, "d": -0.5, "e": 'x\ny\\ "q" \x7f ü €'},
        {"t": {"list": [1, 2], "nested": {"x": {"y": ["a", {"z": False}]}}, "empty": {}}},
        {"needs quotes": {"a.b": 1, "": 2}},
    ],
)
def test_toml_is_read_back_as_it_was(raw):
    assert tomllib.loads(to_toml(raw)) == raw


def test_importance_is_the_share_between_groups_adjusted_for_their_number():
    # Two groups, all of the variance between them; then none of it.
    assert _explained(np.array([1.0, 1, 2, 2]), np.array([0, 0, 1, 1])) == 1
    assert _explained(np.array([1.0, 2, 1, 2]), np.array([0, 0, 1, 1])) == 0
    # Total 2.75, within 2 * 0.5 = 1: 1 - 1 / 2.75 * (4 - 1) / (4 - 2).
    found = _explained(np.array([0.0, 1, 1, 2]) * 1.0, np.array([0, 0, 1, 1]))
    assert found == pytest.approx(max(0, 1 - 1 / 2 * 3 / 2))
    assert _explained(np.array([1.0, 2.0]), np.array([0, 1])) == 0
    assert _explained(np.array([1.0, 1, 1]), np.array([0, 1, 1])) == 0


def test_what_decides_is_important_and_what_was_hardly_tried_is_left_out():
    rng = np.random.default_rng(0)
    trials = [
        trial(
            n, 0.1 + 0.1 * (rate > 1e-3), values=values(rate, "gbce" if n < 3 else "full-softmax")
        )
        for n, rate in enumerate(10 ** rng.uniform(-4, -2, 30))
    ]
    found = importances(trials, SPACE)
    assert next(iter(found)) == RATE
    assert found[RATE] > 0.5
    assert found["loss.kind"] < 0.2
    # One value alone explains nothing; of calibrations there are three.
    assert found["model.num_layers"] == 0
    assert "loss.calibration" not in found


def test_the_headline_says_whether_it_wins():
    better, worse = judge(OURS_SN, THEIRS_SN, seed=0), judge(THEIRS_SN, OURS_SN, seed=0)
    assert (
        make_outcome(TRIALS, better).headline().startswith("trial 3 beats the default, NDCG@10 +")
    )
    assert "does not beat the default beyond noise" in make_outcome(TRIALS, worse).headline()
    assert make_outcome(TRIALS).headline() == "no trial was better than the default, of 5"
    assert make_outcome(TRIALS[2:3]).headline() == "none of 1 trials came to a validation"


def test_the_report_tells_all_that_happened(tmp_path):
    tune = make_config().model_dump(mode="json")["tune"] | {"searcher": "llm"}
    fast = trial(5, 0.01, 0.15, ending="stopped", values=values(3e-3))
    outcome = make_outcome([*TRIALS, fast], judge(OURS_SN, THEIRS_SN, seed=0), tune=tune)
    write_outcome(tmp_path, outcome)
    text = (tmp_path / "report.md").read_text()
    assert "Trial 3 beats the default" in text
    assert "The best trial was decided before the slowest starters turned" in text
    assert "1 of 6 trials, proposed by tpe" in text
    assert "trial 2, failed: The loss of epoch 1 is nan" in text
    assert "trial 3: status 500" in text
    assert "| 4 |  |  |  | 0 | unfinished |" in text
    for name in ("objective", "asha", "parallel"):
        assert (tmp_path / "plots" / f"{name}.svg").exists()
    facts = json.loads((tmp_path / "outcome.json").read_text())
    assert facts["verdict"]["wins"]
    assert facts["winner"]["number"] == 3


def test_a_search_in_which_all_failed_has_a_report_and_no_configuration(tmp_path):
    write_outcome(tmp_path, make_outcome(TRIALS[2:3]))
    assert "None of 1 trials came to a validation" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "best.toml").exists()


def test_a_verdict_is_on_the_mean_over_seeds():
    verdict = judge(OURS_SN, THEIRS_SN, seed=0)
    first = (1 + 1 + 1 / math.log2(6) + 1) / 4
    second = (1 + 1 / math.log2(3) + 1 / math.log2(4) + 1) / 4
    assert verdict.winner_ndcg10 == pytest.approx((first, second))
    assert verdict.num_users == 80
    assert [one.difference.mean for one in verdict.by_seed] == pytest.approx(
        [
            ours - theirs
            for ours, theirs in zip(verdict.winner_ndcg10, verdict.default_ndcg10, strict=True)
        ]
    )
    assert verdict.wins
    assert not judge(OURS_SN, OURS_SN, seed=0).wins

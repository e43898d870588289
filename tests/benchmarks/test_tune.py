"""The benchmark of searches: what it asks for and what it writes."""

import pytest

from benchmarks.tune import AT_ONCE, make_config, render


@pytest.mark.parametrize(("at_once", "cpus"), [(1, 1), (2, 1), (AT_ONCE, 0.25)])
def test_trials_at_once_share_two_cpus_and_none_is_stopped_early(tmp_path, at_once, cpus):
    tune = make_config(str(tmp_path), 8, 3, at_once=at_once).tune
    assert (tune.max_concurrent, tune.cpus_per_trial) == (at_once, cpus)
    assert (tune.max_trials, tune.grace_epochs) == (8, 3)
    assert len(tune.space["optimiser.learning_rate"].values) == 8


def test_only_what_was_measured_is_written():
    part = {"machine": "two cores", "trials": 2, "epochs": 3, "users": 1_000}
    seconds = {"loop": 1.0, "process": 1.1}
    text = render({"overhead": part | {"seconds": seconds, "overhead": {"process": 0.1}}})
    assert "| process | 1.1 | 10.0% |" in text
    assert "| loop | 1.0 | 0.0% |" in text
    assert "## gain" not in text


def test_a_gain_is_written_seed_by_seed():
    verdict = {
        "winner_ndcg10": [0.2, 0.21],
        "default_ndcg10": [0.1, 0.11],
        "differences_by_seed": [0.1, 0.1],
    }
    part = {
        "machine": "two cores",
        "trials": 2,
        "epochs": 3,
        "stopped_early": 1,
        "failed": 0,
        "search_seconds": 10,
        "verdict_seconds": 20,
        "headline": "trial 1 beats the default",
        "winner": {"number": 1, "values": {"model.dim": 64}},
        "verdict": verdict,
        "doubts": ["A doubt."],
    }
    text = render({"gain-synthetic": part})
    assert "Trial 1 beats the default." in text
    assert "| 2 | 0.2100 | 0.1100 | 0.1000 |" in text
    assert "| model.dim | 64 |" in text
    assert text.endswith("A doubt.\n")

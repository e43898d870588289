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
    text = render({"machine": "two cores", "overhead": {"seconds": {"loop": 1.0}}})
    assert "## overhead" in text
    assert '"loop": 1.0' in text
    assert "## gain" not in text

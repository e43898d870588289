"""The log of a search: what it remembers after a kill."""

import math

import pytest

from ray_jobs.tuning.trials import Trial, TrialLog, best_trial, busy_seconds, trials_table
from tests.ray_jobs.tuning.made_up import trial

EPOCH = {"epoch": 1, "ndcg10": 0.2, "error": 0.01, "loss": 3.0, "seconds": 1.5}


@pytest.fixture
def log(tmp_path):
    return TrialLog(tmp_path / "new" / "trials.jsonl")


def test_what_was_written_is_read(log):
    assert log.read() == []
    log.start(0, {"model.dim": 64}, "tpe", 100.0, notes=["late"])
    log.report(0, EPOCH)
    log.report(0, EPOCH | {"epoch": 2, "ndcg10": 0.1})
    log.end(0, "stopped", 103.0, "slow")
    (found,) = log.read()
    assert (found.values, found.origin, found.notes) == ({"model.dim": 64}, "tpe", ("late",))
    assert (found.ending, found.reason, found.ended_s) == ("stopped", "slow", 103.0)
    assert [epoch.epoch for epoch in found.epochs] == [1, 2]
    assert found.best.epoch == 1
    assert found.objective == 0.2


def test_a_line_that_a_kill_cut_off_is_passed_over_and_swallows_nothing(log):
    log.start(0, {}, "tpe", 1.0)
    with log._path.open("a") as file:
        file.write('{"event": "epoch", "num')
    log.end(0, "finished", 2.0)
    assert [one.ending for one in log.read()] == ["finished"]


def test_a_trial_that_begins_anew_forgets_its_epochs(log):
    log.start(0, {}, "tpe", 1.0)
    log.report(0, EPOCH)
    log.start(0, {}, "tpe", 5.0)
    (found,) = log.read()
    assert (found.epochs, found.started_s, found.ending) == ((), 5.0, None)


def test_the_first_end_of_a_trial_stands(log):
    log.start(0, {}, "tpe", 1.0)
    log.end(0, "finished", 5.0)
    log.end(0, "lost", 6.0, "its process went away")
    (found,) = log.read()
    assert (found.ending, found.ended_s, found.reason) == ("finished", 5.0, "")


def test_the_best_is_of_those_that_came_to_an_end_with_a_figure():
    trials = [
        trial(0, 0.1, 0.3, 0.2),
        trial(1, 0.9, ending="failed"),
        trial(2, 0.8, ending=None),
        trial(3, ending="finished"),
        trial(4, 0.25, ending="stopped"),
    ]
    assert best_trial(trials).number == 0
    assert best_trial(trials[1:4]) is None
    assert math.isnan(trials[3].objective)


def test_time_is_counted_once_for_trials_at_the_same_time_and_not_between_drivers():
    def span(start, end):
        return Trial(0, {}, "tpe", start, ending="finished", ended_s=end)

    # 10 s with both, then nobody for 100 s, then one that was killed 2 s after its start.
    killed = trial(3, 0.1, 0.2, ending=None, started_s=120.0, ended_s=math.nan)
    assert busy_seconds([span(10, 18), span(12, 20), span(13, 14), killed]) == 12
    assert busy_seconds([]) == 0


def test_the_table_has_a_row_a_trial_and_a_column_a_parameter():
    table = trials_table(
        [
            trial(0, 0.1, 0.2, values={"model.dim": 64, "model.dropout": 0.1}),
            trial(1, ending="failed", values={"model.dim": 32}, reason="loss is nan"),
        ]
    )
    assert table["ndcg10"].to_pylist() == [0.2, None]
    assert table["curve"].to_pylist() == [[0.1, 0.2], []]
    assert table["value.model.dim"].to_pylist() == [64, 32]
    assert table["value.model.dropout"].to_pylist() == [0.1, None]
    assert table["reason"].to_pylist() == ["", "loss is nan"]
    mixed = trials_table([trial(0, values={"x": 1}), trial(1, values={"x": "all"})])
    assert mixed["value.x"].to_pylist() == ["1", "all"]

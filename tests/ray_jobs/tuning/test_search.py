"""The bridge to Ray Tune: what is tried next, and how trials end. Without a cluster."""

from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import ActorDiedError, RayTaskError
from ray.exceptions import OutOfMemoryError as RayOutOfMemoryError
from ray.tune.search import Searcher as RaySearcher

from ray_jobs.tuning.search import LoggedSearcher, TrialWatch, classify, describe_end
from ray_jobs.tuning.searchers import GridSearch, RandomSearch
from ray_jobs.tuning.trials import TrialLog
from recsys.errors import OutOfMemoryError, TrainingError
from tests.ray_jobs.tuning.made_up import trial
from tests.ray_jobs.tuning.test_searchers import SPACE

RESULT = {
    "epoch": 2,
    "ndcg10": 0.2,
    "error": 0.01,
    "loss": 3.0,
    "seconds": 1.0,
    "objective": 0.3,
    "is_last": False,
}


@pytest.fixture
def log(tmp_path):
    return TrialLog(tmp_path / "trials.jsonl")


def logged(log, searcher=None, max_trials=4, first=None):
    return LoggedSearcher(searcher or RandomSearch(SPACE, 0), log, max_trials, first)


def test_trials_are_numbered_and_written_down_before_they_run(log):
    searcher = logged(log, max_trials=2, first={"model.num_layers": 1})
    assert searcher.suggest("a") == {"number": 0, "values": {"model.num_layers": 1}}
    second = searcher.suggest("b")
    assert second["number"] == 1
    assert [one.values for one in log.read()] == [{"model.num_layers": 1}, second["values"]]
    assert [one.origin for one in log.read()] == ["default", "random"]
    assert searcher.suggest("c") == RaySearcher.FINISHED


def test_what_an_earlier_driver_left_is_tried_first_and_again(log):
    first = logged(log)
    left = [first.suggest(name) for name in "ab"]
    log.report(1, RESULT)
    log.end(0, "finished", 5.0)
    again = logged(log)
    assert again.suggest("c") == left[1]
    assert again.suggest("d")["number"] == 2
    assert log.read()[1].epochs == ()


def test_a_grid_that_is_through_ends_the_search(log):
    searcher = logged(log, GridSearch(SPACE, 2), max_trials=99)
    num = 0
    while searcher.suggest(str(num)) != RaySearcher.FINISHED:
        num += 1
    assert num == len(list(SPACE.grid(2)))


def ended(log, last, **changes):
    log.start(0, {}, "tpe", 1.0)
    watch = TrialWatch(log, clock=lambda: 9.0)
    known = SimpleNamespace(config={"number": 0}, last_result=last, **changes)
    if last:
        watch.on_trial_result(0, [], known, last)
    if changes:
        watch.on_trial_error(0, [], known)
    else:
        watch.on_trial_complete(0, [], known)
    return log.read()[0]


@pytest.mark.parametrize(
    ("last", "ending"),
    [
        (RESULT | {"is_last": True}, "finished"),
        (RESULT | {"done": True}, "stopped"),
        (RESULT, "cut-off"),
        ({}, None),
    ],
)
def test_an_end_is_told_by_the_last_report(log, last, ending):
    found = ended(log, last)
    assert found.ending == ending
    assert [one.ndcg10 for one in found.epochs] == ([0.2] if last else [])


def test_an_error_without_an_object_is_told_by_its_text(log, tmp_path):
    path = tmp_path / "error.txt"
    path.write_text("Failure # 1\nit broke\n")
    found = ended(log, RESULT, pickled_error_file=None, error_file=str(path))
    assert (found.ending, found.reason) == ("failed", "it broke")


def task_error(cause):
    return RayTaskError("train", "a long traceback", cause)


@pytest.mark.parametrize(
    ("error", "ending", "reason"),
    [
        (task_error(TrainingError("The loss is nan.\nmore")), "failed", "The loss is nan."),
        (task_error(OutOfMemoryError("Worker 0 ran out.")), "out-of-memory", "Worker 0 ran out."),
        (torch.OutOfMemoryError("CUDA out of memory."), "out-of-memory", "CUDA out of memory."),
        (RuntimeError("can't allocate memory: you"), "out-of-memory", "can't allocate memory: you"),
        (RayOutOfMemoryError("node is low"), "out-of-memory", "node is low"),
        (ActorDiedError(), "lost", "The actor died unexpectedly before finishing this task."),
        (ValueError(), "failed", "ValueError"),
    ],
)
def test_failures_are_told_apart(error, ending, reason):
    assert classify(error) == (ending, reason)


def test_what_lies_behind_an_error_counts():
    inner = OutOfMemoryError("It did not fit.")
    outer = RuntimeError("training failed")
    outer.__cause__ = inner
    assert classify(outer) == ("out-of-memory", "It did not fit.")


def test_progress_is_a_line_a_trial():
    trials = [trial(0, 0.1, 0.2), trial(1, ending="failed", reason="loss is nan")]
    assert describe_end(0, trials) == (
        "trial 0 finished  NDCG@10 0.2000 +- 0.0100  best 0.2000 (trial 0)"
    )
    assert describe_end(1, trials) == "trial 1 failed  loss is nan  best 0.2000 (trial 0)"

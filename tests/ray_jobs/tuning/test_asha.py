"""Early stopping: what a scheduler that goes on knows, and when it stopped too early."""

from types import SimpleNamespace

import pytest

from ray_jobs.tuning.asha import (
    EPOCH,
    OBJECTIVE,
    describe_doubts,
    find_undecided,
    is_still_climbing,
    make_scheduler,
)
from tests.ray_jobs.tuning.made_up import trial


def decide(scheduler, *ndcg10):
    """What the scheduler says to a new trial after each epoch."""
    known = SimpleNamespace(trial_id="new")
    scheduler.on_trial_add(None, known)
    told = [{EPOCH: number, OBJECTIVE: value} for number, value in enumerate(ndcg10, start=1)]
    return [scheduler.on_trial_result(None, known, one) for one in told]


def test_a_scheduler_that_goes_on_holds_a_trial_against_earlier_ones():
    earlier = [trial(0, 0.3, 0.4), trial(1, 0.4, 0.5), trial(2, 0.9, 0.9, ending=None)]
    settings = {"max_epochs": 8, "grace_epochs": 2, "reduction": 2}
    known = make_scheduler(earlier, **settings)
    assert decide(known, 0.0, 0.2) == ["CONTINUE", "STOP"]
    fresh = make_scheduler([], **settings)
    assert decide(fresh, 0.0, 0.2) == ["CONTINUE", "CONTINUE"]


def test_the_last_epoch_ends_a_trial_and_grace_is_no_longer_than_that():
    scheduler = make_scheduler([], max_epochs=2, grace_epochs=10, reduction=3)
    assert decide(scheduler, 0.1, 0.2) == ["CONTINUE", "STOP"]


WINNER = trial(0, 0.30, 0.35, 0.36, 0.36)


@pytest.mark.parametrize(
    ("curve", "projected"),
    [
        # 0.1 in the last epoch and eight epochs to go.
        ((0.10, 0.20), 0.20 + 8 * 0.10),
        ((0.0, 0.10, 0.14), 0.14 + 7 * 0.04),
        # Slow: 0.20 + 8 * 0.01 stays below 0.36.
        ((0.19, 0.20), None),
        # Turned: the last validation was no better than one before it.
        ((0.10, 0.30, 0.29), None),
        # One validation has no pace.
        ((0.2,), None),
    ],
)
def test_a_stopped_trial_is_undecided_when_its_line_would_pass_the_winner(curve, projected):
    found = find_undecided([WINNER, trial(1, *curve, ending="stopped")], max_epochs=10)
    assert [one.projected for one in found] == (
        [] if projected is None else [pytest.approx(projected)]
    )


def test_the_pace_is_by_epochs_and_not_by_validations():
    slow = trial(1, 0.10, 0.20, ending="stopped", every=5)
    (found,) = find_undecided([WINNER, slow], max_epochs=30)
    assert found.pace == pytest.approx(0.02)
    assert (found.epoch, found.projected) == (10, pytest.approx(0.20 + 20 * 0.02))


def test_only_those_stopped_by_the_scheduler_are_doubted():
    for ending in ("finished", "cut-off", "failed", None):
        assert find_undecided([WINNER, trial(1, 0.1, 0.2, ending=ending)], max_epochs=10) == []
    assert find_undecided([trial(1, 0.1, ending="failed")], max_epochs=10) == []


def test_doubts_are_told_with_their_remedy():
    fast = [trial(number, 0.1, 0.2, ending="stopped") for number in (1, 2)]
    (doubt,) = describe_doubts([WINNER, *fast], max_epochs=10)
    assert "2 of the stopped trials (1, 2)" in doubt
    assert "the earliest at epoch 2" in doubt
    assert doubt.endswith("raise tune.grace_epochs or lower tune.reduction.")
    assert describe_doubts([WINNER], max_epochs=10) == []
    assert describe_doubts([], max_epochs=10) == []


def test_a_winner_that_was_best_at_its_end_is_doubted():
    climbing = trial(3, 0.1, 0.2)
    assert is_still_climbing(climbing)
    assert not is_still_climbing(WINNER)
    (doubt,) = describe_doubts([climbing], max_epochs=2)
    assert "raise tune.max_epochs" in doubt

"""Which trials are stopped early, and whether that was too early.

Asynchronous successive halving (Li et al., 2020, arXiv:1810.05934) as Ray Tune has it: at
`grace`, `grace * reduction`, ... epochs a trial goes on when it is among the best `1 / reduction`
of those that came so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from ray.tune.schedulers import AsyncHyperBandScheduler

from ray_jobs.tuning.trials import Trial, best_trial

EPOCH, OBJECTIVE = "epoch", "objective"
"""What trials report to Ray Tune: epochs that are done, and the best NDCG@10 so far."""


def make_scheduler(
    trials: Sequence[Trial], *, max_epochs: int, grace_epochs: int, reduction: float
) -> AsyncHyperBandScheduler:
    """A scheduler that has seen these trials already.

    Args:
        trials: of the search before its driver died; those that did not end are not counted.
    """
    scheduler = AsyncHyperBandScheduler(
        time_attr=EPOCH,
        metric=OBJECTIVE,
        mode="max",
        max_t=max_epochs,
        grace_period=min(grace_epochs, max_epochs),
        reduction_factor=reduction,
    )
    for trial in trials:
        if trial.ending is not None:
            _replay(scheduler, trial)
    return scheduler


def _replay(scheduler: AsyncHyperBandScheduler, trial: Trial) -> None:
    # The scheduler knows a trial by its id alone.
    known = SimpleNamespace(trial_id=f"earlier-{trial.number}")
    scheduler.on_trial_add(None, known)
    best = 0.0
    for epoch in trial.epochs:
        best = max(best, epoch.ndcg10)
        scheduler.on_trial_result(None, known, {EPOCH: epoch.epoch, OBJECTIVE: best})


@dataclass(frozen=True)
class Undecided:
    """A trial that was stopped while it might still have won."""

    number: int
    epoch: int
    """At which it was stopped."""
    ndcg10: float
    pace: float
    """What the last epochs brought, NDCG@10 an epoch."""
    projected: float
    """NDCG@10 at `max_epochs` at that pace."""


def find_undecided(trials: Sequence[Trial], max_epochs: int) -> list[Undecided]:
    """Stopped trials whose curve had not turned: at the pace of their last improvement they would
    have passed the best trial before the end.

    The last improvement is that of the best NDCG@10 from the validation before the last one to the
    last one; a line is drawn through both, and `projected` is where it stands at `max_epochs`.
    Curves bend, so this warns of too many rather than of too few. A trial with a single validation
    has no pace and is not doubted.
    """
    winner = best_trial(trials)
    if winner is None:
        return []
    stopped = [one for one in trials if one.ending == "stopped" and one.number != winner.number]
    found = [_project(trial, max_epochs) for trial in stopped if trial.epochs]
    return [one for one in found if one.pace > 0 and one.projected > winner.objective]


def is_still_climbing(trial: Trial) -> bool:
    """Whether the last validation of a trial was its best, so that more epochs might help."""
    return trial.best is not None and len(trial.epochs) > 1 and trial.best == trial.epochs[-1]


def describe_doubts(trials: Sequence[Trial], max_epochs: int) -> list[str]:
    """Warnings for the report, empty when there is no reason to doubt the order of the trials."""
    doubts = []
    undecided = find_undecided(trials, max_epochs)
    winner = best_trial(trials)
    if undecided:
        earliest = min(one.epoch for one in undecided)
        names = ", ".join(str(one.number) for one in undecided[:10])
        doubts.append(
            f"The best trial was decided before the slowest starters turned: {len(undecided)} of "
            f"the stopped trials ({names}) were improving so fast, the earliest at epoch "
            f"{earliest}, that they would have passed it by epoch {max_epochs}; raise "
            "tune.grace_epochs or lower tune.reduction."
        )
    if winner is not None and is_still_climbing(winner):
        doubts.append(
            f"The best trial, {winner.number}, was best at its last epoch, "
            f"{winner.epochs[-1].epoch}; what more epochs bring, good or bad, nobody has seen: "
            "raise tune.max_epochs."
        )
    return doubts


def _project(trial: Trial, max_epochs: int) -> Undecided:
    last = trial.epochs[-1]
    now = trial.objective
    before = trial.epochs[:-1]
    pace = 0.0
    if before:
        earlier = max(epoch.ndcg10 for epoch in before)
        pace = max(0.0, now - earlier) / (last.epoch - before[-1].epoch)
    projected = now + pace * (max_epochs - last.epoch)
    return Undecided(trial.number, last.epoch, now, pace, projected)

"""The trials of a search on the cluster, with Ray Tune.

Ray Tune starts, packs and stops trials. What is proposed comes from a `searchers.Searcher`, and
what happened goes into a `TrialLog`, so that nothing hangs on Ray Tune's own memory: a search that
is started again after its driver died begins a new experiment of Ray Tune, with a scheduler that
has seen the earlier trials, and tries those that did not end first.
"""

import logging
import os
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.data
import ray.tune
import torch
from ray.exceptions import OutOfMemoryError as RayOutOfMemoryError
from ray.exceptions import RayActorError, RayTaskError
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.logger import TBXLoggerCallback
from ray.tune.search import Searcher as RaySearcher

from ray_jobs.cluster_size import reachable
from ray_jobs.errors import JobError
from ray_jobs.tuning.asha import OBJECTIVE, make_scheduler
from ray_jobs.tuning.searchers import Proposal, Searcher
from ray_jobs.tuning.space import Values
from ray_jobs.tuning.training import (
    Report,
    SearchTask,
    Validations,
    resources_of,
    train_here,
    train_with_ray,
)
from ray_jobs.tuning.trials import Ending, Epoch, Trial, TrialLog, best_trial, busy_seconds
from recsys.errors import OutOfMemoryError, RecsysError
from recsys.out_of_memory import is_out_of_memory
from recsys.tokens import TokenStore

log = logging.getLogger(__name__)

_DRIVER_CPUS = 0.01
"""Of a trial that only waits for the workers of Ray Train."""


@dataclass(frozen=True)
class Data:
    """The tokens: in one piece for trials that train by themselves, as a data set for groups."""

    store: TokenStore
    tokens: ray.data.Dataset


def search(
    task: SearchTask,
    data: Data,
    searcher: Searcher,
    trials: TrialLog,
    *,
    first: Values | None = None,
) -> list[Trial]:
    """Runs trials until `tune.max_trials` ended, the budget is spent or nothing is left to try.

    Args:
        first: values of the very first trial, before the searcher is asked.
    """
    tune, known = task.config.tune, trials.read()
    num_left = tune.max_trials - sum(trial.ending is not None for trial in known)
    seconds_left = _seconds_left(task, known)
    if num_left <= 0 or (seconds_left is not None and seconds_left <= 0):
        return known
    _set_environment()
    ray.tune.Tuner(
        ray.tune.with_resources(_trainable(task, data), _resources(task)),
        tune_config=ray.tune.TuneConfig(
            search_alg=LoggedSearcher(searcher, trials, tune.max_trials, first),
            scheduler=make_scheduler(
                known,
                max_epochs=task.max_epochs,
                grace_epochs=tune.grace_epochs,
                reduction=tune.reduction,
            ),
            num_samples=num_left,
            max_concurrent_trials=num_concurrent(task),
            time_budget_s=seconds_left,
            # A new process for each trial would import torch each time; one that waits for a group
            # cannot be interrupted, and goes with its group.
            reuse_actors=tune.trains_in_trial,
            trial_dirname_creator=_folder_name,
        ),
        run_config=ray.tune.RunConfig(
            name=f"search-{time.time_ns()}",
            storage_path=str(task.folder / "ray"),
            callbacks=[TrialWatch(trials), TBXLoggerCallback()],
            verbose=0,
        ),
    ).fit()
    return trials.read()


def num_concurrent(task: SearchTask) -> int:
    """Trials that fit into the cluster at once, `tune.max_concurrent` at most.

    Raises: JobError when not even one fits.
    """
    tune = task.config.tune
    num_cpus, num_gpus = reachable("CPU"), reachable("GPU")
    fits = int(num_cpus / tune.cpus_per_trial + 1e-6)
    if tune.gpus_per_trial:
        fits = min(fits, int(num_gpus / tune.gpus_per_trial + 1e-6))
    if fits < 1:
        raise JobError(
            f"A trial of {tune.cpus_per_trial:g} CPUs and {tune.gpus_per_trial:g} GPUs does not "
            f"fit into the cluster's {num_cpus:g} and {num_gpus:g}; lower "
            "tune.cpus_per_trial or tune.gpus_per_trial."
        )
    return fits if tune.max_concurrent is None else min(fits, tune.max_concurrent)


class LoggedSearcher(RaySearcher):  # type: ignore[misc]
    """A searcher as Ray Tune knows one; trials that an earlier driver left come first."""

    def __init__(
        self, searcher: Searcher, trials: TrialLog, max_trials: int, first: Values | None
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self._searcher, self._trials = searcher, trials
        self._max_trials, self._first = max_trials, first
        self._started: set[int] = set()

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Number and values of the next trial."""
        found = self._next(self._trials.read())
        if found is None:
            return str(RaySearcher.FINISHED)
        number, proposal = found
        self._started.add(number)
        self._trials.start(
            number, proposal.values, proposal.origin, time.time(), notes=proposal.notes
        )
        return {"number": number, "values": proposal.values}

    def _next(self, trials: Sequence[Trial]) -> tuple[int, Proposal] | None:
        for trial in trials:
            if trial.ending is None and trial.number not in self._started:
                return trial.number, Proposal(trial.values, trial.origin, trial.notes)
        if len(trials) >= self._max_trials:
            return None
        if not trials and self._first is not None:
            return 0, Proposal(self._first, "default")
        proposal = self._searcher.propose(trials)
        return None if proposal is None else (len(trials), proposal)

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: `TrialWatch` has written it down."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is known is in the log of trials."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


class TrialWatch(ray.tune.Callback):  # type: ignore[misc]
    """Writes down what trials report and how they end."""

    def __init__(self, trials: TrialLog, clock: Callable[[], float] = time.time) -> None:
        self._trials, self._clock = trials, clock

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        epoch = {name: result[name] for name in Epoch.__dataclass_fields__}
        self._trials.report(trial.config["number"], epoch)
        if result["is_last"]:
            # Not when its process is done with: a driver may die in between.
            self._end(trial.config["number"], "finished")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        if "epoch" not in last:
            return  # the budget ended before it had begun; it is tried when the search goes on
        if not last["is_last"]:
            self._end(trial.config["number"], "stopped" if last.get("done") else "cut-off")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ending, reason = classify(_error_of(trial))
        self._end(trial.config["number"], ending, reason)

    def _end(self, number: int, ending: Ending, reason: str = "") -> None:
        self._trials.end(number, ending, self._clock(), reason)
        print(describe_end(number, self._trials.read()), flush=True)


def describe_end(number: int, trials: Sequence[Trial]) -> str:
    """How a trial ended and how the search stands, as one line."""
    trial, best = trials[number], best_trial(trials)
    words = [f"trial {number} {trial.ending}"]
    if trial.reason:
        words.append(trial.reason)
    if trial.best is not None:
        words.append(f"NDCG@10 {trial.best.ndcg10:.4f} +- {trial.best.error:.4f}")
    if best is not None:
        words.append(f"best {best.objective:.4f} (trial {best.number})")
    return "  ".join(words)


def classify(error: BaseException) -> tuple[Ending, str]:
    """How a trial ended that raised this, and why, in one line."""
    chain = list(_causes(error))
    for one in chain:
        if isinstance(one, OutOfMemoryError | RayOutOfMemoryError) or is_out_of_memory(one):
            return "out-of-memory", _first_line(one)
    if any(isinstance(one, RayActorError) for one in chain):
        return "lost", _first_line(chain[-1])
    ours = [one for one in chain if isinstance(one, RecsysError)]
    return "failed", _first_line((ours or chain)[-1])


def _causes(error: BaseException | None) -> Any:
    """The error and what lies behind it, the outermost first."""
    seen: list[BaseException] = []
    while error is not None and all(error is not one for one in seen):
        seen.append(error)
        yield error
        behind = error.cause if isinstance(error, RayTaskError) else error.__cause__
        error = behind if isinstance(behind, BaseException) else None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _error_of(trial: Any) -> BaseException:
    if trial.pickled_error_file is not None:
        # Written by this very process, from what the trial's process raised.
        error = pickle.loads(Path(trial.pickled_error_file).read_bytes())
        if isinstance(error, BaseException):
            return error
    path = trial.error_file
    text = "" if path is None else Path(path).read_text().strip()
    return JobError(text.splitlines()[-1] if text else "the trial ended without a reason")


def _trainable(task: SearchTask, data: Data) -> Any:
    if task.config.tune.trains_in_trial:
        return ray.tune.with_parameters(run_trial_here, task=task, store=data.store)
    return ray.tune.with_parameters(run_trial_with_ray, task=task, tokens=data.tokens)


def run_trial_here(trial: Mapping[str, Any], *, task: SearchTask, store: TokenStore) -> None:
    """A trial that trains in its own process. Raises: TrainingError, OutOfMemoryError."""
    torch.set_num_threads(max(1, int(task.config.tune.cpus_per_trial)))
    plan = task.plan(trial["values"], task.config.seed)
    # Arrays from the object store cannot be written, which torch warns of.
    train_here(plan, TokenStore.concatenate([store]), _tell)


def run_trial_with_ray(
    trial: Mapping[str, Any], *, task: SearchTask, tokens: ray.data.Dataset
) -> None:
    """A trial that waits for the workers of Ray Train. Raises: TrainingError, OutOfMemoryError."""
    plan = task.plan(trial["values"], task.config.seed)
    # A name that was there before would go on with what is there.
    name = f"trial-{trial['number']}-{time.time_ns()}"
    told = Validations(plan, partial(_pass_on, TuneReportCallback()))
    train_with_ray(plan, tokens, task.folder / "ray" / "train", name, [told])


def _tell(report: Report) -> None:
    ray.tune.report(dict(report))


def _pass_on(callback: TuneReportCallback, report: Report) -> None:
    callback.after_report(None, [dict(report)], None)


def _resources(task: SearchTask) -> dict[str, float]:
    if not task.config.tune.trains_in_trial:
        return {"cpu": _DRIVER_CPUS}
    return {name.lower(): amount for name, amount in resources_of(task.config).items()}


def _seconds_left(task: SearchTask, known: Sequence[Trial]) -> float | None:
    minutes = task.config.tune.max_minutes
    return None if minutes is None else 60 * minutes - busy_seconds(known)


def _folder_name(trial: Any) -> str:
    return f"trial-{trial.config['number']:04d}-{trial.trial_id}"


def _set_environment() -> None:
    # CSV and JSON files of each trial would say again what the log of trials says.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # Trials stay in the working directory, where relative paths of a configuration begin.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")

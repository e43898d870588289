"""One training of a recipe for a search: in this process, or by a group of Ray Train's workers.

A training with one worker does not need Ray Train: the process of the trial trains by itself, which
spares it the start of a controller and a worker (`benchmarks/tune.py` measures it).
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.data
import torch
from ray.train import (
    Checkpoint,
    DataConfig,
    FailureConfig,
    LoggingConfig,
    Result,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer
from torch import Tensor

from ray_jobs.config import PipelineConfig
from ray_jobs.sequences_reader import Vocabulary
from ray_jobs.train_worker import KEPT, WorkerPlan, build_trainer, train_worker
from ray_jobs.tuning.space import as_overrides
from recsys.checkpoint import read_weights
from recsys.errors import OutOfMemoryError, TrainingError
from recsys.recipe import read_recipe
from recsys.tokens import TokenStore

Report = Mapping[str, Any]
"""Keys of `trials.Epoch`, and `objective` (the best NDCG@10 so far) and `is_last`."""


@dataclass(frozen=True)
class SearchTask:
    """What all trainings of a search share."""

    config: PipelineConfig
    vocabulary: Vocabulary
    folder: Path
    """Of the search; a group of workers writes its checkpoints below it."""

    @property
    def max_epochs(self) -> int:
        return max_epochs_of(self.config)

    def plan(self, values: Mapping[str, Any], seed: int) -> WorkerPlan:
        """A training with these values instead of the recipe's own. Raises: ValueError."""
        train = self.config.train
        recipe = read_recipe(train.recipe, as_overrides(values, train.recipe, train.overrides))
        # Minutes depend on what else runs; a plan in epochs does not.
        limits = {"max_epochs": self.max_epochs, "max_minutes": None}
        trainer = train.trainer.model_copy(update=limits)
        config = self.config.model_copy(
            update={"seed": seed, "train": train.model_copy(update={"trainer": trainer})}
        )
        return WorkerPlan(config, recipe, self.vocabulary, held_out=self.config.tune.held_out_share)


def max_epochs_of(config: PipelineConfig) -> int:
    """Epochs of a trial that nobody stops."""
    return config.tune.max_epochs or config.train.trainer.max_epochs


def train_here(
    plan: WorkerPlan,
    store: TokenStore,
    report: Callable[[Report], None],
    *,
    keeps_weights: bool = False,
) -> dict[str, Tensor]:
    """Trains in this process, reporting each validation; the weights of the best epoch on the CPU,
    none unless asked for.

    Raises: TrainingError, OutOfMemoryError.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    trainer = build_trainer(plan, store, device=device)
    best: dict[str, Tensor] = {}
    while not trainer.should_stop:
        epoch = trainer.train_epoch()
        if not epoch.is_validated:
            continue
        if keeps_weights and trainer.best_epoch == epoch.epoch:
            best = {name: one.cpu().clone() for name, one in trainer.model.state_dict().items()}
        report(
            describe(
                epoch.metrics(),
                best_ndcg10=trainer.best_ndcg10,
                seconds=time.perf_counter() - started,
                is_last=trainer.should_stop,
            )
        )
    return best


def describe(
    metrics: Mapping[str, Any], *, best_ndcg10: float, seconds: float, is_last: bool
) -> dict[str, Any]:
    """An epoch's metrics as a trial tells them."""
    return {
        "epoch": metrics["epoch"],
        "ndcg10": metrics["ndcg10"],
        "error": metrics["ndcg10_error"],
        "loss": metrics["loss"],
        "seconds": seconds,
        "objective": best_ndcg10,
        "is_last": is_last,
    }


class Validations(UserCallback):  # type: ignore[misc]
    """Passes on what the first of Ray Train's workers reports of each validation.

    Args:
        plan: epochs and patience, by which the last validation is known.
    """

    def __init__(self, plan: WorkerPlan, report: Callable[[Report], None]) -> None:
        self._trainer, self._report = plan.config.train.trainer, report
        # It is made in one process and called in another, which has no clock in common but this.
        self._best, self._without_gain, self._started = 0.0, 0, time.time()

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        first = metrics[0]
        if "step" in first or first["ndcg10"] != first["ndcg10"]:
            return
        self._without_gain = 0 if first["ndcg10"] > self._best else self._without_gain + 1
        self._best = max(self._best, first["ndcg10"])
        is_done = first["epoch"] >= self._trainer.max_epochs
        self._report(
            describe(
                first,
                best_ndcg10=self._best,
                seconds=time.time() - self._started,
                is_last=is_done or self._without_gain >= self._trainer.patience,
            )
        )


def train_with_ray(
    plan: WorkerPlan,
    tokens: ray.data.Dataset,
    folder: Path,
    name: str,
    callbacks: list[UserCallback],
) -> dict[str, Tensor]:
    """Trains with a group of `tune.workers_per_trial` workers; the weights of the best epoch.

    Raises: TrainingError, OutOfMemoryError, TrainingFailedError.
    """
    # Ray throttles reports to one in two seconds by default; a short epoch would wait for it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    train, tune = plan.config.train, plan.config.tune
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan},
        scaling_config=ScalingConfig(
            num_workers=tune.workers_per_trial,
            use_gpu=tune.gpus_per_trial > 0,
            resources_per_worker=resources_of(plan.config),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder),
            checkpoint_config=KEPT,
            failure_config=FailureConfig(max_failures=train.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=callbacks,
        ),
        datasets={"tokens": tokens},
        dataset_config=DataConfig(datasets_to_split=[]),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise _reason(error) from error
    if "refused" in result.return_value:
        raise TrainingError(result.return_value["refused"])
    return _best_weights(result)


def resources_of(config: PipelineConfig) -> dict[str, float]:
    """What a process that trains is given: a worker of a trial, or the trial itself."""
    tune = config.tune
    share = {"CPU": tune.cpus_per_trial / tune.workers_per_trial}
    if tune.gpus_per_trial:
        share["GPU"] = tune.gpus_per_trial / tune.workers_per_trial
    return share


def _best_weights(result: Result) -> dict[str, Tensor]:
    checkpoint, _ = max(
        (pair for pair in result.best_checkpoints if "ndcg10" in pair[1]),
        key=lambda pair: float(pair[1]["ndcg10"]),
    )
    with checkpoint.as_directory() as folder:
        return read_weights(Path(folder))


def _reason(error: TrainingFailedError) -> Exception:
    """The failure that began it, where it is one of ours."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    short = [failure for failure in failures if isinstance(failure, OutOfMemoryError)]
    return short[0] if short else error

"""Trains a recipe on the sequences table with Ray Train and leaves a run folder behind.

    python -m ray_jobs.train --config synthetic --set train.trainer.max_epochs=10

The run folder `<storage root>/runs/<name>/` then holds the best weights with everything needed to
use them, `history.jsonl` (one line an epoch) and `run.json`; `<storage root>/runs/LATEST` names it.
"""

import json
import logging
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray.data
from ray.train import (
    Checkpoint,
    ControllerError,
    DataConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train import ScalingConfig as Scaling
from ray.train.torch import TorchTrainer
from torch import Tensor

from data_lake.storage import locate
from ray_jobs.cluster_size import present, reachable, refuse_absent_accelerator
from ray_jobs.code_version import code_version
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.job import Report, main
from ray_jobs.job_metrics import JobMetrics
from ray_jobs.run_log import RunLog
from ray_jobs.sequences_reader import (
    Learned,
    Vocabulary,
    learn_vocabulary,
    load_tokens,
    open_sequences,
)
from ray_jobs.start import Start, open_start
from ray_jobs.train_worker import KEPT, WorkerPlan, train_worker
from recsys.artifact import save_model
from recsys.checkpoint import read_weights
from recsys.errors import CheckpointError, OutOfMemoryError, TrainingError
from recsys.recipe import Recipe, read_recipe
from recsys.targets import find_targets

log = logging.getLogger(__name__)

_VERSIONS = "versions.json"


def run(config: PipelineConfig) -> Report:
    """Trains, and writes the run folder. Raises: JobError, TableError, TrainingError."""
    started = time.perf_counter()
    run_folder = _run_folder(config)
    recipe = read_recipe(config.train.recipe, config.train.overrides)
    scaling = _scaling(config)
    start = open_start(config, recipe, run_folder)
    new_since_s = None if start is None else start.new_since_s
    began_with = _read_versions(run_folder)
    sequences = open_sequences(config, began_with.get("sequences_version"))
    learned = learn_vocabulary(sequences, config, new_since_s, began_with.get("items_version"))
    vocabulary = learned.vocabulary
    find_targets(config.train.targets, vocabulary.context)  # those that nobody knows are refused
    _refuse_untrainable(learned, start)
    _refuse_unknown_columns(recipe, vocabulary)
    tokens = load_tokens(sequences, config, vocabulary)

    versions = {
        "sequences_version": sequences.version(),
        "items_version": learned.items_version,
    }
    _keep_versions(run_folder, versions)
    weights = None if start is None else start.write(run_folder, vocabulary, config.seed)
    plan = WorkerPlan(config, recipe, vocabulary, new_since_s, weights)
    result = _fit(plan, run_folder, tokens, scaling)
    best_weights, metrics = _read_best(result.best_checkpoints)
    facts = {
        **versions,
        "trained_until_us": learned.trained_until_us,
        "started_from": None if start is None else start.facts(),
        "eager_because": result.return_value.get("eager_because"),
        "best": {key: metrics[key] for key in ("epoch", "ndcg10", "hr10", "loss")},
    }
    _write_run(run_folder, plan, best_weights, facts)
    if weights is not None:
        weights.path.unlink()
    history = read_history(run_folder)
    seconds = time.perf_counter() - started
    _publish(config, metrics["ndcg10"], seconds, history[-1]["tokens_per_s"])
    return Report(
        "train",
        f"{recipe.name} reached NDCG@10 {metrics['ndcg10']:.4f} on validation",
        {
            "run": run_folder.name,
            "items": vocabulary.catalogue.num_items,
            "epochs": len(history),
            "best_epoch": metrics["epoch"],
            "validation_ndcg10": metrics["ndcg10"],
            "validation_hr10": metrics["hr10"],
            "workers": scaling.max_workers,
            "device": "gpu" if scaling.use_gpu else "cpu",
            "tokens_per_s": history[-1]["tokens_per_s"],
            "seconds": seconds,
        },
    )


def preview(config: PipelineConfig) -> dict[str, Any]:
    """What a dry run tells: the version that training would start from. Raises as `run` does."""
    if config.train.start is None:
        return {}
    recipe = read_recipe(config.train.recipe, config.train.overrides)
    start = open_start(config, recipe, _run_folder(config))
    return {"started_from": None if start is None else start.facts()}


def read_history(run_folder: Path) -> list[dict[str, Any]]:
    """The epochs of a run in order; of an epoch that was repeated after a failure, the last try."""
    path = run_folder / "history.jsonl"
    epochs = {entry["epoch"]: entry for entry in map(json.loads, path.read_text().splitlines())}
    return [epochs[number] for number in sorted(epochs)]


def _publish(config: PipelineConfig, ndcg10: float, seconds: float, tokens_per_s: float) -> None:
    metrics = JobMetrics("train", config)
    metrics.set("nextitem_train_ndcg10_ratio", ndcg10, "NDCG@10 on validation, of the best epoch.")
    metrics.set("nextitem_train_seconds", seconds, "What the last training took.")
    metrics.set("nextitem_train_tokens_per_second", tokens_per_s, "Speed of its last epoch.")
    metrics.publish()


def _fit(plan: WorkerPlan, folder: Path, tokens: ray.data.Dataset, scaling: Scaling) -> Any:
    # Ray throttles reports to one in two seconds by default; a short epoch would wait for it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    # With Ray's own patch of print() every line of progress would stand twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    config = plan.config.train
    filesystem, path = locate(
        plan.config.storage.checkpoints_uri(folder.name), plan.config.storage.options
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan},
        scaling_config=scaling,
        run_config=RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=KEPT,
            failure_config=FailureConfig(max_failures=config.max_failures),
            # Ray would log each report in full; the lines of RunLog say the same to a person.
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[RunLog(folder, config.trainer.max_epochs)],
        ),
        datasets={"tokens": tokens},
        dataset_config=DataConfig(datasets_to_split=[]),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise JobError(
            f"Training stopped{_say_how_often(error, config.max_failures)}: {_find_reason(error)}. "
            f"Start it again with train.name={folder.name} to go on from its last checkpoint."
        ) from error
    if "refused" in result.return_value:
        raise TrainingError(result.return_value["refused"])
    return result


def _say_how_often(error: TrainingFailedError, max_failures: int) -> str:
    # What fails beside the workers, such as writing the history, is not tried again.
    if isinstance(error, ControllerError) or max_failures == 0:
        return ""
    return f" after {max_failures} {'retry' if max_failures == 1 else 'retries'}"


def _find_reason(error: TrainingFailedError) -> str:
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    # The ranks that waited for this one say only that it went away.
    short = [str(failure) for failure in failures if isinstance(failure, OutOfMemoryError)]
    reason = short[0] if short else str(error).strip().splitlines()[-1]
    return reason.rstrip(".")


def _read_best(
    checkpoints: list[tuple[Checkpoint, dict[str, Any]]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and metrics of the best epoch whose checkpoint is whole.

    Raises: TrainingError when none is; JobError when the best one cannot be reached.
    """
    validated = [pair for pair in checkpoints if "ndcg10" in pair[1]]
    for checkpoint, metrics in sorted(validated, key=lambda pair: -float(pair[1]["ndcg10"])):
        try:
            with checkpoint.as_directory() as path:
                return read_weights(Path(path)), metrics
        except CheckpointError as error:
            log.warning("%s Taking the next best epoch.", error)
        except OSError as error:
            raise JobError(
                f"The run is trained, and its best checkpoint cannot be reached: {error}; start it "
                "again with its name when it can be."
            ) from error
    raise TrainingError("No checkpoint of the run is whole, so there are no weights to keep.")


def _refuse_untrainable(learned: Learned, start: Start | None = None) -> None:
    num_items = learned.vocabulary.catalogue.num_items
    if num_items < 2:
        raise JobError(
            f"The catalogue holds {num_items} item, so there is nothing to choose from; ingest "
            "events on two items at least."
        )
    if learned.num_trainable == 0 and start is not None and start.config.new_events_only:
        raise JobError(
            f"No user has a training event since {start.facts()['trained_until']}, until when "
            f"version {start.artifact.version} was trained; ingest newer events, rebuild the "
            "sequences, or set train.start.new_events_only to false."
        )
    if learned.num_trainable == 0 or learned.num_validated == 0:
        raise JobError(
            f"Of all users {learned.num_trainable} have two training events and "
            f"{learned.num_validated} a validation event; both are needed. Ingest longer "
            "histories, or choose other dates in [split] or other events in [train.targets]."
        )


def _refuse_unknown_columns(recipe: Recipe, vocabulary: Vocabulary) -> None:
    """Raises: CatalogueError when item codes are made of a column that the catalogue lacks."""
    if recipe.model.item_codes is not None:
        for name in recipe.model.item_codes.attributes.fields:
            vocabulary.catalogue.column(name)


def _write_run(
    folder: Path, plan: WorkerPlan, weights: dict[str, Tensor], facts: dict[str, Any]
) -> None:
    config, vocabulary = plan.config, plan.vocabulary
    model = vocabulary.make_model(plan.recipe.model)
    model.load_state_dict(weights)
    save_model(folder, model, vocabulary.catalogue, vocabulary.context, vocabulary.attributes)

    content = {
        "name": folder.name,
        "config": config.model_dump(mode="json"),
        "recipe": plan.recipe.model_dump(mode="json"),
        "seed": config.seed,
        "code_sha256": code_version(),
        **facts,
        "history": read_history(folder),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (folder / "run.json").write_text(json.dumps(content, indent=1))
    latest = folder.parent / f".LATEST-{os.getpid()}"
    latest.write_text(folder.name)
    os.replace(latest, folder.parent / "LATEST")


def _read_versions(folder: Path) -> dict[str, int | None]:
    """The versions of the tables that a run began with; none of a run that has yet to begin."""
    path = folder / _VERSIONS
    if not path.exists():
        return {}
    versions: dict[str, int | None] = json.loads(path.read_text())
    log.warning("The run %r goes on with what it began with: %s.", folder.name, versions)
    return versions


def _keep_versions(folder: Path, versions: dict[str, int | None]) -> None:
    """Whatever the lake holds when the run goes on, it goes on with these."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{_VERSIONS}-{os.getpid()}"
    temporary.write_text(json.dumps(versions))
    os.replace(temporary, folder / _VERSIONS)


def _run_folder(config: PipelineConfig) -> Path:
    if "://" in config.storage.runs_uri:
        raise JobError(
            f"Runs are written to a folder, not to {config.storage.runs_uri}; set storage.root to "
            "one, and storage.checkpoints for what workers elsewhere write."
        )
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    name = config.train.name or f"{config.train.recipe}-{now}"
    folder = Path(config.storage.runs_uri) / name
    if (folder / "run.json").exists():
        raise JobError(f"The run {name!r} is finished already; give train.name another value.")
    return folder


def _scaling(config: PipelineConfig) -> Scaling:
    train = config.train
    num_cpus, num_gpus = reachable("CPU"), int(reachable("GPU"))
    use_gpu = train.device == "gpu" or (train.device == "auto" and num_gpus > 0)
    num_workers = (
        min(train.num_workers, num_gpus)
        if train.device == "auto" and use_gpu
        else train.num_workers
    )
    least = num_workers if train.min_workers is None else min(train.min_workers, num_workers)
    if train.accelerator_type is not None and not use_gpu:
        raise JobError(
            f"train.accelerator_type is {train.accelerator_type!r}, and training would run on "
            "CPUs; add such GPUs to the cluster, or leave train.accelerator_type out."
        )
    if num_cpus < least * train.cpus_per_worker:
        raise JobError(
            f"{least} workers of {train.cpus_per_worker:g} CPUs do not fit into the "
            f"cluster's {num_cpus:g}; lower train.num_workers or train.cpus_per_worker."
        )
    if use_gpu and num_gpus < least:
        raise JobError(
            f"train.device is 'gpu' but the cluster has {num_gpus} GPUs for {least} "
            "workers; lower train.num_workers or set train.device to 'auto'."
        )
    if train.accelerator_type is not None:
        refuse_absent_accelerator(train.accelerator_type)
    needed = {"CPU": train.cpus_per_worker, **({"GPU": 1} if use_gpu else {})}
    _say_what_is_awaited(least, needed)
    return Scaling(
        num_workers=num_workers if least == num_workers else (least, num_workers),
        use_gpu=use_gpu,
        accelerator_type=train.accelerator_type,
        resources_per_worker=needed,
    )


def _say_what_is_awaited(least: int, needed: dict[str, float]) -> None:
    for resource, each in needed.items():
        if present(resource) < least * each:
            log.warning(
                "Training begins when the cluster has grown: it has %g %ss, %d workers need %g.",
                *(present(resource), resource, least, least * each),
            )


if __name__ == "__main__":
    main(run, job="train", preview=preview)

"""Trains a recipe on the sequences table with Ray Train and leaves a run folder behind.

    python -m ray_jobs.train --config synthetic --set train.trainer.max_epochs=10

The run folder `<storage root>/runs/<name>/` then holds the best weights with everything needed to
use them, `history.jsonl` (one line an epoch) and `run.json`; `<storage root>/runs/LATEST` names it.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.train
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    DataConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    TrainingFailedError,
)
from ray.train import ScalingConfig as Scaling
from ray.train.torch import TorchTrainer, get_device

from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.job import Report, main
from ray_jobs.sequences_reader import (
    Learned,
    Vocabulary,
    collect_tokens,
    learn_vocabulary,
    load_tokens,
    open_sequences,
)
from recsys.artifact import save_model
from recsys.item_codes import agree_on_codes
from recsys.recipe import Recipe, read_recipe
from recsys.splits import split_tokens
from recsys.targets import find_targets
from recsys.tokens import TokenStore
from recsys.trainer import EpochReport, Trainer, load_checkpoint, save_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerPlan:
    """What every worker is given beside the tokens."""

    config: PipelineConfig
    recipe: Recipe
    vocabulary: Vocabulary
    run: Path


def run(config: PipelineConfig) -> Report:
    """Trains, and writes the run folder. Raises: JobError, TableError, TrainingError."""
    started = time.perf_counter()
    run_folder = _run_folder(config)
    recipe = read_recipe(config.train.recipe, config.train.overrides)
    scaling = _scaling(config)
    sequences = open_sequences(config)
    learned = learn_vocabulary(sequences, config)
    vocabulary = learned.vocabulary
    find_targets(config.train.targets, vocabulary.context)  # those that nobody knows are refused
    _refuse_untrainable(learned)
    _refuse_unknown_columns(recipe, vocabulary)
    tokens = load_tokens(sequences, config, vocabulary)

    run_folder.mkdir(parents=True, exist_ok=True)
    result = _fit(WorkerPlan(config, recipe, vocabulary, run_folder), tokens, scaling)
    best = max(result.best_checkpoints, key=lambda pair: float(pair[1]["ndcg10"]))
    _write_run(run_folder, config, recipe, learned, sequences.version(), best)
    history = read_history(run_folder)
    metrics = best[1]
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
            "workers": scaling.num_workers,
            "device": "gpu" if scaling.use_gpu else "cpu",
            "tokens_per_s": history[-1]["tokens_per_s"],
            "seconds": time.perf_counter() - started,
        },
    )


def train_worker(plan_parts: Mapping[str, Any]) -> None:
    """What runs on each worker: every rank holds all tokens and takes its part of each batch."""
    # Ray Train logs each report in full from a logger below the root, past its own settings.
    logging.getLogger().setLevel(logging.WARNING)
    plan: WorkerPlan = plan_parts["plan"]
    context = plan.vocabulary.context
    store = collect_tokens(ray.train.get_dataset_shard("tokens"), len(context.fields))
    checkpoint = ray.train.get_checkpoint()
    trainer = _build_trainer(plan, store, learns_codes=checkpoint is None)
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            load_checkpoint(Path(folder), trainer)

    started, first_epoch = time.perf_counter(), trainer.epoch
    max_minutes = plan.config.train.trainer.max_minutes
    while not trainer.should_stop:
        epoch = trainer.train_epoch()
        elapsed_s = time.perf_counter() - started
        if trainer.rank == 0:
            _record(plan, trainer, epoch, elapsed_s / (trainer.epoch - first_epoch))
        if epoch.is_validated:
            _report(trainer, epoch)
            if max_minutes is not None and _is_over(elapsed_s / 60 > max_minutes, trainer):
                break


def read_history(run_folder: Path) -> list[dict[str, Any]]:
    """The epochs of a run in order; of an epoch that was repeated after a failure, the last try."""
    path = run_folder / "history.jsonl"
    epochs = {entry["epoch"]: entry for entry in map(json.loads, path.read_text().splitlines())}
    return [epochs[number] for number in sorted(epochs)]


def _build_trainer(plan: WorkerPlan, store: TokenStore, *, learns_codes: bool) -> Trainer:
    """A checkpoint brings the item codes with the weights: then nobody learns them."""
    config, context, catalogue = plan.config, plan.vocabulary.context, plan.vocabulary.catalogue
    # The same seed on every rank: all start from the same weights.
    torch.manual_seed(config.seed)
    model = plan.vocabulary.make_model(plan.recipe.model)
    targets = find_targets(config.train.targets, context)
    split, codes = split_tokens(store, config.split, targets), plan.recipe.model.item_codes
    if codes is not None and learns_codes:
        seed, device = config.seed, get_device()
        model.load_codes(agree_on_codes(codes, store, split, catalogue, seed=seed, device=device))
    return Trainer(
        plan.recipe,
        config.train.trainer,
        model,
        store,
        split,
        context.known_at_request_F,
        seed=config.seed,
        device=get_device(),
        targets=targets,
        # The best epoch is chosen by what will be evaluated.
        filter_seen=config.evaluate.filter_seen,
    )


def _fit(plan: WorkerPlan, tokens: ray.data.Dataset, scaling: Scaling) -> Any:
    # Ray throttles reports to one in two seconds by default; a short epoch would wait for it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    # With Ray's own patch of print() every line of progress would stand twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan},
        scaling_config=scaling,
        run_config=RunConfig(
            name="ray",
            storage_path=str(plan.run),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="ndcg10", checkpoint_score_order="max"
            ),
            failure_config=FailureConfig(max_failures=plan.config.train.max_failures),
            # Ray would log each report in full; the line of `_record` says the same to a person.
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        datasets={"tokens": tokens},
        dataset_config=DataConfig(datasets_to_split=[]),
    )
    try:
        return trainer.fit()
    except TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        raise JobError(
            f"Training stopped after {plan.config.train.max_failures} retries: {reason} "
            f"Start it again with train.name={plan.run.name} to go on from its last checkpoint."
        ) from error


def _refuse_untrainable(learned: Learned) -> None:
    num_items = learned.vocabulary.catalogue.num_items
    if num_items < 2:
        raise JobError(
            f"The catalogue holds {num_items} item, so there is nothing to choose from; ingest "
            "events on two items at least."
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


def _record(plan: WorkerPlan, trainer: Trainer, epoch: EpochReport, epoch_s: float) -> None:
    with (plan.run / "history.jsonl").open("a") as file:
        file.write(json.dumps(epoch.metrics()) + "\n")
    planned = plan.config.train.trainer.max_epochs
    eta_s = epoch_s * (planned - trainer.epoch)
    ndcg10 = f"NDCG@10 {epoch.ndcg10:.4f}" if epoch.is_validated else "not validated"
    print(
        f"epoch {trainer.epoch}/{planned}  loss {epoch.loss:.4f}  {ndcg10}  "
        f"{epoch.tokens_per_s:,.0f} tokens/s  at most {eta_s:.0f} s to go",
        flush=True,
    )


def _report(trainer: Trainer, epoch: EpochReport) -> None:
    if trainer.rank != 0:
        ray.train.report(epoch.metrics())
        return
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), trainer)
        ray.train.report(epoch.metrics(), checkpoint=Checkpoint.from_directory(folder))


def _is_over(is_late: bool, trainer: Trainer) -> bool:
    # Clocks differ between ranks; the first one decides for all.
    verdict = torch.tensor(int(is_late), device=trainer.device)
    if trainer.world_size > 1:
        torch.distributed.broadcast(verdict, src=0)
    return bool(verdict)


def _write_run(
    folder: Path,
    config: PipelineConfig,
    recipe: Recipe,
    learned: Learned,
    sequences_version: int,
    best: tuple[Checkpoint, dict[str, Any]],
) -> None:
    checkpoint, metrics = best
    vocabulary = learned.vocabulary
    model = vocabulary.make_model(recipe.model)
    with checkpoint.as_directory() as path:
        saved = torch.load(Path(path) / "trainer.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(saved["weights"])
    save_model(folder, model, vocabulary.catalogue, vocabulary.context, vocabulary.attributes)

    content = {
        "name": folder.name,
        "config": config.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json"),
        "seed": config.seed,
        "sequences_version": sequences_version,
        "items_version": learned.items_version,
        "best": {key: metrics[key] for key in ("epoch", "ndcg10", "hr10", "loss")},
        "history": read_history(folder),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (folder / "run.json").write_text(json.dumps(content, indent=1))
    latest = folder.parent / f".LATEST-{os.getpid()}"
    latest.write_text(folder.name)
    os.replace(latest, folder.parent / "LATEST")


def _run_folder(config: PipelineConfig) -> Path:
    if "://" in config.storage.runs_uri:
        raise JobError(
            "Runs are written to a folder that all workers share, not to "
            f"{config.storage.runs_uri}; set storage.root to such a folder."
        )
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    name = config.train.name or f"{config.train.recipe}-{now}"
    folder = Path(config.storage.runs_uri) / name
    if (folder / "run.json").exists():
        raise JobError(f"The run {name!r} is finished already; give train.name another value.")
    return folder


def _scaling(config: PipelineConfig) -> Scaling:
    train, has = config.train, ray.cluster_resources()
    num_cpus, num_gpus = has.get("CPU", 0), int(has.get("GPU", 0))
    use_gpu = train.device == "gpu" or (train.device == "auto" and num_gpus > 0)
    num_workers = (
        min(train.num_workers, num_gpus)
        if train.device == "auto" and use_gpu
        else train.num_workers
    )
    if num_cpus < num_workers * train.cpus_per_worker:
        raise JobError(
            f"{num_workers} workers of {train.cpus_per_worker:g} CPUs do not fit into the "
            f"cluster's {num_cpus:g}; lower train.num_workers or train.cpus_per_worker."
        )
    if use_gpu and num_gpus < num_workers:
        raise JobError(
            f"train.device is 'gpu' but the cluster has {num_gpus} GPUs for {num_workers} "
            "workers; lower train.num_workers or set train.device to 'auto'."
        )
    return Scaling(
        num_workers=num_workers,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": train.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
    )


if __name__ == "__main__":
    main(run, job="train")

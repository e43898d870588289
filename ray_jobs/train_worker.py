"""What runs on each worker of a training: every rank holds all tokens and takes its part of each
batch.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, ReportedCheckpoint
from ray.train.torch import get_device

from ray_jobs.config import PipelineConfig
from ray_jobs.free_memory import free_memory_bytes
from ray_jobs.sequences_reader import Vocabulary, collect_tokens
from ray_jobs.start_weights import StartWeights
from recsys.checkpoint import Saved, read_checkpoint, restore, save_checkpoint
from recsys.errors import CheckpointError, TrainingError
from recsys.item_start import prepare_items
from recsys.memory_advice import refuse_what_cannot_fit
from recsys.memory_plan import Workload
from recsys.out_of_memory import explain_out_of_memory
from recsys.precision import choose_dtype
from recsys.ranks import gather_rows, rank_and_world_size, sum_over_ranks
from recsys.recipe import Recipe
from recsys.splits import Split, hold_out, split_tokens
from recsys.targets import find_targets
from recsys.tokens import TokenStore
from recsys.trainer import Trainer

log = logging.getLogger(__name__)

STANDING = "standing"
"""Metric of a checkpoint that says which ones are kept."""
KEPT = CheckpointConfig(
    num_to_keep=3, checkpoint_score_attribute=STANDING, checkpoint_score_order="max"
)
"""The best epoch and the two latest checkpoints, see `_standing`."""


@dataclass(frozen=True)
class WorkerPlan:
    """What every worker is given beside the tokens."""

    config: PipelineConfig
    recipe: Recipe
    vocabulary: Vocabulary
    new_since_s: int | None = None
    """Only events from then on are targets, seconds since the epoch."""
    start: StartWeights | None = None
    """What a run begins with instead of random weights."""
    held_out: float = 0.0
    """Share of the validation users that take no part; with it nobody is tested either."""

    def split(self, store: TokenStore) -> Split:
        """What trains and what validates."""
        config = self.config
        targets = find_targets(config.train.targets, self.vocabulary.context)
        split = split_tokens(store, config.split, targets)
        # The same users, whatever the seed of the training is.
        return hold_out(split, self.held_out)[0] if self.held_out else split


def train_worker(plan_parts: Mapping[str, Any]) -> dict[str, str]:
    """Trains to the end of the plan and reports each epoch.

    What would happen again at every try is returned as `{"refused": reason}` by all ranks, and not
    raised, which Ray Train would take for a fault and repeat. A model that could not be compiled is
    `{"eager_because": reason}`.
    """
    # Ray Train logs each report in full from a logger below the root, past its own settings.
    logging.getLogger().setLevel(logging.WARNING)
    plan: WorkerPlan = plan_parts["plan"]
    store = collect_tokens(
        ray.train.get_dataset_shard("tokens"), len(plan.vocabulary.context.fields)
    )
    try:
        _refuse_what_cannot_fit(plan, store)
        checkpoints = _reported_checkpoints()
        rank, _ = rank_and_world_size()
        with explain_out_of_memory(
            f"Worker {rank} ran out of memory before its first step", "train a smaller model"
        ):
            trainer = build_trainer(plan, store, is_new=not checkpoints)
            resume_from(checkpoints, trainer)
        _train(trainer, plan.config.train.trainer.max_minutes)
    except TrainingError as error:
        return {"refused": str(error)}
    return {"eager_because": trainer.eager_because} if trainer.eager_because else {}


def build_trainer(
    plan: WorkerPlan,
    store: TokenStore,
    *,
    is_new: bool = True,
    device: torch.device | None = None,
) -> Trainer:
    """A trainer at its start, on this worker's device unless another one is given. What a
    checkpoint or the weights of a start bring along, item codes among it, is not learned first:
    `is_new` says that there is no checkpoint. Raises: TrainingError.
    """
    config, context, catalogue = plan.config, plan.vocabulary.context, plan.vocabulary.catalogue
    # The same seed on every rank: all start from the same weights.
    torch.manual_seed(config.seed)
    model = plan.vocabulary.make_model(plan.recipe.model)
    if plan.start is not None:
        model.load_state_dict(plan.start.read())
    targets = find_targets(config.train.targets, context)
    split = plan.split(store)
    device = get_device() if device is None else device
    if is_new and plan.start is None:
        data = store, split, catalogue
        prepare_items(model, plan.recipe, *data, seed=config.seed, device=device)
    return Trainer(
        plan.recipe,
        config.train.trainer,
        model,
        store,
        split,
        context.known_at_request_F,
        seed=config.seed,
        device=device,
        targets=targets,
        new_since_s=plan.new_since_s,
        # The best epoch is chosen by what will be evaluated.
        filter_seen=config.evaluate.filter_seen,
    )


def resume_from(candidates: list[Checkpoint], trainer: Trainer) -> None:
    """Continues from the first of these that is whole to every rank; each rank calls it.

    Raises: TrainingError when there are some and none is, or it is of another training; OSError on
        all ranks when one of them cannot reach a checkpoint: the next try may.
    """
    for checkpoint in candidates:
        saved = _read_together(checkpoint, trainer)
        if saved is not None:
            _restore(saved, trainer)
            return
    if candidates:
        raise TrainingError(
            f"None of the run's {len(candidates)} checkpoints is whole; give train.name another "
            "value to start anew."
        )


def _read_together(checkpoint: Checkpoint, trainer: Trainer) -> Saved | None:
    """A checkpoint that is whole to every rank; None, on all of them, when it is not."""
    saved: Saved | None = None
    reason = "Another worker found a checkpoint that is not whole."
    unreachable: OSError | None = None
    try:
        with checkpoint.as_directory() as folder:
            saved = read_checkpoint(Path(folder), trainer.device)
    except CheckpointError as error:
        reason = str(error)
    except OSError as error:
        unreachable = error
    found = [float(saved is None), float(unreachable is not None)]
    num_without, num_unreachable = sum_over_ranks(found, trainer.device)
    if num_unreachable:
        raise OSError(
            f"{num_unreachable:.0f} of {trainer.world_size} workers cannot reach the checkpoint "
            f"{checkpoint.path}: {unreachable or 'this one can'}"
        ) from unreachable
    if num_without:
        log.warning("%s Going on from the checkpoint before it.", reason)
        return None
    return saved


def _restore(saved: Saved, trainer: Trainer) -> None:
    try:
        restore(saved, trainer)
    except CheckpointError as error:
        raise TrainingError(
            f"{error}; configure what the run began with, or give train.name another value."
        ) from error


def _reported_checkpoints() -> list[Checkpoint]:
    """The checkpoints that the run has kept, the latest first; none when it begins."""
    latest = ray.train.get_checkpoint()
    if latest is None:
        return []
    # Ray gives them in the order of their standing.
    reported = sorted(ray.train.get_all_reported_checkpoints(), key=_place, reverse=True)
    earlier = [report.checkpoint for report in reported if report.checkpoint.path != latest.path]
    return [latest, *earlier]


def _place(report: ReportedCheckpoint) -> tuple[int, int]:
    """Epochs that were done, and steps of the next one."""
    return report.metrics["epoch"], report.metrics.get("step", 0)


def _train(trainer: Trainer, max_minutes: float | None) -> None:
    while not trainer.should_stop:
        epoch = trainer.train_epoch(_report_within(trainer))
        _report(trainer, epoch.metrics(), with_checkpoint=epoch.is_validated)
        is_late = max_minutes is not None and trainer.seconds > 60 * max_minutes
        if epoch.is_validated and _is_over(is_late, trainer):
            break


def _report_within(trainer: Trainer) -> Callable[[], None]:
    """What takes checkpoints and tells of progress within an epoch; every rank comes by after the
    same steps.
    """
    every = trainer.config.checkpoint_every_steps

    def after_step() -> None:
        is_within = trainer.step < trainer.steps_per_epoch
        if every is not None and trainer.step % every == 0 and is_within:
            _report(trainer, trainer.add_up_progress(), with_checkpoint=True)
        elif trainer.news is not None:
            _report(trainer, trainer.news, with_checkpoint=False)

    return after_step


def _report(trainer: Trainer, metrics: dict[str, float], *, with_checkpoint: bool) -> None:
    if trainer.rank != 0 or not with_checkpoint:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), trainer)
        ray.train.report(
            {**metrics, STANDING: _standing(trainer)}, checkpoint=Checkpoint.from_directory(folder)
        )


def _standing(trainer: Trainer) -> float:
    """By this Ray keeps the best epoch and the two latest checkpoints of any kind.

    A new best epoch stands above all. Whatever follows stands below it and above the best epoch
    before; of those that stand alike Ray keeps the later ones.
    """
    is_best = trainer.step == 0 and trainer.epoch == trainer.best_epoch
    return trainer.best_epoch if is_best else trainer.best_epoch - 0.5


def _is_over(is_late: bool, trainer: Trainer) -> bool:
    # Clocks differ between ranks; the first one decides for all.
    (verdict,) = sum_over_ranks([float(is_late and trainer.rank == 0)], trainer.device)
    return verdict > 0


def _refuse_what_cannot_fit(plan: WorkerPlan, store: TokenStore) -> None:
    """Every rank plans with the least memory that any of them has, and all stop when one must."""
    device, (rank, world_size) = get_device(), rank_and_world_size()
    trainer = plan.config.train.trainer
    workload = Workload(
        num_rows=plan.vocabulary.catalogue.num_rows,
        num_tokens=store.num_tokens,
        context_sizes=plan.vocabulary.context.sizes,
        dtype=choose_dtype(trainer.precision, device),
        micro_batches=trainer.micro_batches,
        num_workers=world_size,
        is_cuda=device.type == "cuda",
        has_bf16=choose_dtype("auto", device) == torch.bfloat16,
        has_weights=plan.start is not None,
        validation_users=trainer.validation_users,
    )
    available_R1 = gather_rows(torch.tensor([[_available_bytes(device)]], device=device))
    reason = ""
    try:
        memory = refuse_what_cannot_fit(plan.recipe, workload, int(available_R1.min()))
        if rank == 0:
            print(f"each worker will hold up to {memory}", flush=True)
    except TrainingError as error:
        reason = str(error)
    (num_refusing,) = sum_over_ranks([float(bool(reason))], device)
    if num_refusing:
        raise TrainingError(reason or "Training does not fit into the memory of another worker.")


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    # Workers of a node share what is free on it, or in their container.
    num_sharing: int = ray.train.get_context().get_local_world_size()
    return free_memory_bytes() // num_sharing

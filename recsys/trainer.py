"""The training loop, in plain PyTorch: one object that trains an epoch, validates and saves itself.

It knows ranks only through `torch.distributed`; `ray_jobs.train` runs one of these on each worker.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from recsys.assembly import Assembler, Piece
from recsys.compilation import compile_blocks, leave_eager, run_eagerly
from recsys.errors import TrainingError
from recsys.fingerprint import refuse_another, take_fingerprint
from recsys.heap import Heap
from recsys.losses import compute_loss
from recsys.model import NextItemModel
from recsys.optimiser import Optimiser, scheduled_rate
from recsys.out_of_memory import advise_less, explain_out_of_memory
from recsys.precision import agree_on_dtype
from recsys.progress import EpochReport, Progress, Watch, num_not_finite
from recsys.randomness import Purpose
from recsys.ranks import rank_and_world_size, sum_over_ranks
from recsys.recipe import Recipe
from recsys.replicas import replicate, without_exchange
from recsys.splits import Split
from recsys.targets import TargetEvents
from recsys.tokens import TokenStore
from recsys.touched_rows import TouchedRows
from recsys.validation import Validation, sample_users
from recsys.windows import Places

log = logging.getLogger(__name__)


class TrainerConfig(BaseModel):
    """How long to train and when to stop."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_epochs: int = Field(50, ge=1)
    max_minutes: float | None = Field(None, gt=0)
    validate_every: int = Field(1, ge=1)
    """Epochs between validations; each validation is also a checkpoint."""
    patience: int = Field(5, ge=1)
    """Validations without a better NDCG@10 before training stops."""
    validation_users: int = Field(5_000, ge=1)
    """At most so many users, the same sample every time, are ranked in a validation."""
    precision: str = Field("auto", pattern="^(auto|fp32|bf16)$")
    """auto: bf16 where a GPU multiplies it natively or a CPU faster than fp32, else fp32."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Checkpoints within an epoch, beside those after each validation: for epochs of hours."""
    report_every_seconds: float = Field(30.0, gt=0)
    """Between reports of progress within an epoch, which are no checkpoints."""
    micro_batches: int = Field(1, ge=1)
    """Parts of a worker's batch that are trained one after the other (gradient accumulation): the
    same result with as much less memory for activations."""
    compile: bool = False
    """Compiles the blocks of the model with torch.compile, which takes a minute or so at the start.
    Where there is no compiler, or it fails, training goes on without and says why."""


class Trainer:
    """Trains `model` on the windows of a token store.

    A step depends on the seed, on its number and on the global batch, and not on how many ranks
    share it.

    Args:
        known_at_request_F: which context fields a scored position may carry, bool.
        seed: of the order of windows, the masks, the negatives and dropout.
        device: where the tokens and the model live.
        targets: which events are predicted, and what they weigh; None: all, the same. The split
            must have been made with them.
        new_since_s: only events at or after this moment, in seconds since 1970, are learned to be
            predicted; those before are read.
        filter_seen: whether validation leaves items of the history out of the ranking.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: TrainerConfig,
        model: NextItemModel,
        store: TokenStore,
        split: Split,
        known_at_request_F: np.ndarray,
        *,
        seed: int,
        device: torch.device,
        targets: TargetEvents | None = None,
        new_since_s: int | None = None,
        filter_seen: bool = True,
    ) -> None:
        self.recipe, self.config, self.seed, self.device = recipe, config, seed, device
        self.rank, self.world_size = rank_and_world_size()
        self.model = model.to(device)
        self.dtype = agree_on_dtype(config.precision, device)
        self._refuse_empty_parts()

        self._assembler = Assembler(
            recipe,
            store,
            split,
            known_at_request_F,
            num_rows=len(model.item_bias),
            seed=seed,
            micro_batches=config.micro_batches,
            device=device,
            targets=targets,
            new_since_s=new_since_s,
        )
        self._validation_users = sample_users(split.validation_U, config.validation_users, seed)
        self._validation = Validation(
            store, split, self._validation_users, known_at_request_F, filter_seen
        )
        self._touched = None
        if recipe.optimiser.item_rows == "touched":
            self._touched = TouchedRows(self.model.item_parameters)
            self.model.touch(self._touched)
        self.eager_because = self._compile() if config.compile else ""
        """Why the model is not compiled although it should be."""
        self._replica = replicate(self.model, self.world_size, self._touched)
        self._optimiser = Optimiser(self.model, recipe.optimiser, self._touched)
        windows = self._assembler.windows
        self.steps_per_epoch = windows.num_batches(recipe.batch_size)
        self._fingerprint = take_fingerprint(
            recipe, seed, store, split, targets, num_windows=len(windows)
        )
        self.epoch = 0
        self.best_ndcg10 = -math.inf
        self.best_epoch = 0
        self.ndcg10_error = math.nan
        """Standard error of NDCG@10 in the last validation."""
        self._validations_without_gain = 0
        self._progress = Progress()
        self._watch, self._heap = Watch(config.report_every_seconds, device), Heap()
        self._heap.bound_kernels()
        self.news: dict[str, float] | None = None
        """Progress that is to be told after this step, on every rank; see `add_up_progress`."""
        self._since_s, self._seconds_before = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """What the training took so far, on this rank's clock, with the tries that it goes on from;
        what they lost is not counted."""
        return self._seconds_before + time.perf_counter() - self._since_s

    @property
    def step(self) -> int:
        """Steps that the epoch has had."""
        return self._progress.step

    @property
    def should_stop(self) -> bool:
        """Whether the plan is done or validation stopped improving."""
        is_done = self.epoch >= self.config.max_epochs
        return is_done or self._validations_without_gain >= self.config.patience

    def train_epoch(self, after_step: Callable[[], None] | None = None) -> EpochReport:
        """Trains an epoch, or what is left of it, on every rank; then validates where it is due.

        `after_step` is called on every rank after each step; a checkpoint taken in it goes on right
        there. Raises: TrainingError when the model has item codes that nobody loaded, or a loss or
        weight is not finite, within seconds; OutOfMemoryError, on the rank that it befell alone.
        """
        self._refuse_random_codes()
        self._progress.started = time.perf_counter()
        self._watch.begin()
        self.model.train()
        first = self.step
        for places in self._assembler.windows.batches(
            self.recipe.batch_size,
            self.seed + self.epoch,
            rank=self.rank,
            world_size=self.world_size,
            first=first,
        ):
            self._step_within_memory(places)
            self._look_at_progress()
            if after_step is not None:
                after_step()
        progress = self.add_up_progress()
        elapsed = time.perf_counter() - self._progress.started
        self.epoch, self._progress = self.epoch + 1, Progress()
        hr10, ndcg10 = self._validate_if_due()
        windows = (self.steps_per_epoch - first) * self.recipe.batch_size
        return EpochReport(
            self.epoch,
            progress["loss"],
            ndcg10,
            hr10,
            windows / elapsed,
            progress["tokens_per_s"],
            self._learning_rate(),
            math.nan if math.isnan(ndcg10) else self.ndcg10_error,
        )

    def add_up_progress(self) -> dict[str, float]:
        """What the epoch has brought so far, over all ranks: `epoch` (those that are done), `step`
        of `steps`, `loss`, `tokens_per_s`. Every rank calls it before one of them takes `state()`
        within an epoch.

        Raises: TrainingError when the loss, a weight or a moment is not finite.
        """
        sums = sum_over_ranks(self._progress.sums(), self.device)
        progress = self._describe(sums)
        reason = self.find_broken()
        (num_broken,) = sum_over_ranks([float(bool(reason))], self.device)
        if num_broken:
            raise TrainingError(reason or "The weights of another worker are not finite.")
        # On from here the first rank alone carries what was before.
        self._progress.carry(sums if self.rank == 0 else [0.0, 0.0, 0.0])
        return progress

    def find_broken(self) -> str:
        """Why this model is not to be kept; empty when weights and moments are finite."""
        values = [list(self.model.parameters()), self._optimiser.state()]
        if not num_not_finite(values):
            return ""
        return (
            f"Weights or their moments after step {self.step} of epoch {self.epoch + 1} are not "
            f"finite; {self._advise_calm()}."
        )

    def _look_at_progress(self) -> None:
        self.news = None
        if self._watch.is_due():
            self._heap.tend()
            progress = self._describe(sum_over_ranks(self._progress.sums(), self.device))
            # The report of the epoch says as much as that of its last step.
            if self._watch.look() and self.step < self.steps_per_epoch:
                self.news = progress

    def _describe(self, sums: list[float]) -> dict[str, float]:
        told = self._progress.describe(sums)
        if not math.isfinite(told["loss"]):
            raise TrainingError(
                f"The loss of epoch {self.epoch + 1} is {told['loss']}; {self._advise_calm()}."
            )
        return {"epoch": self.epoch, "step": self.step, "steps": self.steps_per_epoch, **told}

    def _advise_calm(self) -> str:
        rate = self.recipe.optimiser.learning_rate
        return f"lower optimiser.learning_rate (now {rate}) or train in fp32"

    def validate(self) -> tuple[float, float]:
        """(HR@10, NDCG@10) over the validation users, each rank ranking its part of them.

        Raises: TrainingError when a score is not a number; OutOfMemoryError on one rank alone.
        """
        with (
            explain_out_of_memory(
                f"Worker {self.rank} ran out of memory in the validation of epoch {self.epoch}",
                "free memory on its device, or train a smaller model",
            ),
            run_eagerly() if self._is_compiled else contextlib.nullcontext(),
        ):
            found = self._validation.rank(self.model, self.dtype)
        self.ndcg10_error = found.ndcg10_error
        return found.hr10, found.ndcg10

    def state(self) -> dict[str, Any]:
        """Everything beside the weights that a resumed run needs, as tensors and plain values."""
        return {
            "fingerprint": self._fingerprint,
            "seconds": self.seconds,
            "optimiser": self._optimiser.state(),
            "epoch": self.epoch,
            "progress": {
                "step": self.step,
                "loss_sum": float(self._progress.loss_sum),
                "weight": float(self._progress.weight),
            },
            "best_ndcg10": self.best_ndcg10,
            "best_epoch": self.best_epoch,
            "validations_without_gain": self._validations_without_gain,
        }

    def restore(self, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Continues after the step at whose end `state()` and the weights were taken.

        Raises: ValueError when they are of another training.
        """
        # Of a state from before there were fingerprints nothing is known.
        refuse_another(state.get("fingerprint", self._fingerprint), self._fingerprint)
        self._since_s, self._seconds_before = time.perf_counter(), state.get("seconds", 0.0)
        self.model.load_state_dict(weights)
        self._optimiser.restore(state["optimiser"])
        self.epoch = state["epoch"]
        progress = Progress(**state["progress"])
        if self.rank != 0:
            progress.loss_sum = progress.weight = 0.0
        self._progress = progress
        self.best_ndcg10, self.best_epoch = state["best_ndcg10"], state["best_epoch"]
        self._validations_without_gain = state["validations_without_gain"]

    def _step_within_memory(self, places: Places) -> None:
        advice = advise_less(self.recipe.batch_size, self.config.micro_batches, self.world_size)
        with explain_out_of_memory(
            f"Worker {self.rank} ran out of memory in step {self.step + 1} of epoch "
            f"{self.epoch + 1}",
            advice,
        ):
            self._train_step(places)

    def _train_step(self, places: Places) -> None:
        number = self.epoch * self.steps_per_epoch + self.step
        pieces = self._assembler.assemble(places, number)
        # Every rank hides the same ids.
        self.model.hide_ids(pieces[0].draws.generator(Purpose.HIDDEN_IDS))
        if self._touched is not None:
            self._touched.open(torch.cat([items for piece in pieces for items in piece.items]))
        for piece in pieces:
            is_last = piece is pieces[-1]
            with contextlib.nullcontext() if is_last else without_exchange(self._replica):
                loss = self._loss(piece)
                # Ranks are averaged over, and each brings its share of the sum.
                torch.autograd.backward(loss * (piece.share * self.world_size))
            self._progress.loss_sum += loss.detach() * piece.batch.weight
            self._progress.weight += piece.batch.weight
        self._optimiser.step(self._learning_rate())
        self._optimiser.zero_grad()
        self._progress.step += 1
        self._progress.num_tokens += int(places.lengths_B.sum())

    def _loss(self, piece: Piece) -> Tensor:
        batch = piece.batch
        noise = piece.draws.noise(batch.items_BL.shape[1])
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden_MD = self._replica(
                batch.items_BL,
                batch.context_BLF,
                batch.request_BLF,
                batch.seconds_BL2,
                noise,
                batch.scored_M,
            )
        return compute_loss(
            self.recipe.loss,
            hidden_MD.to(self.dtype),
            *self.model.output_rows(),
            batch.targets_M,
            piece.negatives,
            batch.weights_M,
            seen=piece.seen,
        )

    @property
    def _is_compiled(self) -> bool:
        return self.config.compile and not self.eager_because

    def _compile(self) -> str:
        """Every rank compiles, or none does. Returns why none does, empty otherwise."""
        reason = compile_blocks(self.model, self.dtype)
        (num_failed,) = sum_over_ranks([float(bool(reason))], self.device)
        if not num_failed:
            return ""
        leave_eager(self.model)
        reason = reason or "another worker could not compile it"
        if self.rank == 0:
            log.warning("Training goes on without torch.compile: %s.", reason)
        return reason

    def _refuse_empty_parts(self) -> None:
        num_parts = self.world_size * self.config.micro_batches
        if self.recipe.batch_size < num_parts:
            raise TrainingError(
                f"A batch of {self.recipe.batch_size} windows cannot be shared by "
                f"{self.world_size} workers in {self.config.micro_batches} parts each; raise "
                "batch_size or lower train.num_workers."
            )

    def _refuse_random_codes(self) -> None:
        if self.model.lacks_codes:
            raise TrainingError(
                "The recipe has model.item_codes and nobody learned them, so that items would keep "
                "random ones; pass those of item_codes.learn_codes to model.load_codes, or restore "
                "a checkpoint."
            )

    def _learning_rate(self) -> float:
        number = self.epoch * self.steps_per_epoch + self.step
        total = self.config.max_epochs * self.steps_per_epoch
        return scheduled_rate(self.recipe.optimiser, number, total)

    def _validate_if_due(self) -> tuple[float, float]:
        is_due = (
            self.epoch % self.config.validate_every == 0 or self.epoch >= self.config.max_epochs
        )
        if not is_due:
            return math.nan, math.nan
        hr10, ndcg10 = self.validate()
        if ndcg10 > self.best_ndcg10:
            self.best_ndcg10, self.best_epoch = ndcg10, self.epoch
            self._validations_without_gain = 0
        else:
            self._validations_without_gain += 1
        return hr10, ndcg10

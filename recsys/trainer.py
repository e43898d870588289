"""The training loop, in plain PyTorch: one object that trains an epoch, validates and saves itself.

It knows ranks only through `torch.distributed`; `ray_jobs.train` runs one of these on each worker.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recsys.batches import Batch, BatchMaker, TargetWeights
from recsys.context import NO_TIME, count_seconds
from recsys.errors import TrainingError
from recsys.evaluation import rank_targets
from recsys.interactions import training_positions
from recsys.losses import compute_loss
from recsys.model import NextItemModel
from recsys.negatives import BatchTargets, NegativeSampler
from recsys.optimiser import make_optimiser, scheduled_rate
from recsys.randomness import Draws, Purpose
from recsys.ranks import gather_lists, gather_rows, rank_and_world_size, sum_over_ranks
from recsys.recipe import Recipe
from recsys.scorer import ModelScorer
from recsys.splits import Split
from recsys.targets import TargetEvents
from recsys.tokens import TokenStore
from recsys.windows import Places, Windows


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
    """auto: bf16 where the device multiplies it natively, else fp32."""
    micro_batches: int = Field(1, ge=1)
    """Parts of a worker's batch that are trained one after the other (gradient accumulation): the
    same result with as much less memory for activations."""


@dataclass(frozen=True)
class EpochReport:
    """What one epoch cost and brought; NaN for a metric that was not measured."""

    epoch: int
    loss: float
    ndcg10: float
    hr10: float
    windows_per_s: float
    tokens_per_s: float
    learning_rate: float

    @property
    def is_validated(self) -> bool:
        return not math.isnan(self.ndcg10)

    def metrics(self) -> dict[str, float]:
        return asdict(self)


@dataclass
class _Progress:
    """What an epoch has brought so far, of this rank alone."""

    step: int = 0
    loss_sum: float | Tensor = 0.0
    weight: float | Tensor = 0.0


@dataclass(frozen=True)
class _Piece:
    """A part of a global batch that is trained at once."""

    batch: Batch
    draws: Draws
    of_batch: BatchTargets
    share: float
    """Of the weight of the global batch."""


class Trainer:
    """Trains `model` on the windows of a token store.

    A step depends on the seed, on its number and on the global batch, and not on how many ranks
    share it. (Dropout on a GPU is an exception: torch draws it, on each rank for itself.)

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
        self.dtype = choose_dtype(config.precision, device)
        self._store, self._split = store, split
        self._known_at_request_F = known_at_request_F
        self._filter_seen = filter_seen
        self._refuse_empty_parts()

        # Of a causal window one event at least is a target and no input, so it is one event longer.
        window = recipe.model.max_len + (recipe.model.attention == "causal")
        new_since = _count_from_first(store.timestamps_T, new_since_s)
        is_target_T = _mark_targets(store, targets, new_since)
        self._windows = Windows(store, split, window, device, is_target_T)
        if len(self._windows) == 0:
            since = "" if new_since_s is None else ", or none of them is new"
            raise TrainingError(
                f"No user has two training events, the later one a target{since}; there is nothing "
                "to learn from."
            )
        self._batch_maker = BatchMaker(
            recipe.objective,
            torch.from_numpy(known_at_request_F).to(device),
            num_rows=len(model.item_bias),
            targets=None if targets is None else TargetWeights.of(targets, device),
            new_since=new_since,
        )
        self._sampler = self._make_sampler(is_target_T)
        self._validation_users = _sample_users(split.validation_U, config.validation_users, seed)
        self._replica: nn.Module = self.model
        if self.world_size > 1:
            # Buffers are the same everywhere; the attributes of millions of items would travel.
            self._replica = DistributedDataParallel(self.model, broadcast_buffers=False)
        self._optimiser = make_optimiser(self.model, recipe.optimiser)
        self.steps_per_epoch = self._windows.num_batches(recipe.batch_size)
        self.epoch = 0
        self.best_ndcg10 = -math.inf
        self.best_epoch = 0
        self._validations_without_gain = 0
        self._progress = _Progress()

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
        there.
        """
        start = time.perf_counter()
        self.model.train()
        first, num_tokens = self.step, 0
        for places in self._windows.batches(
            self.recipe.batch_size,
            self.seed + self.epoch,
            rank=self.rank,
            world_size=self.world_size,
            first=first,
        ):
            self._train_step(places)
            num_tokens += int(places.lengths_B.sum())
            if after_step is not None:
                after_step()
        loss_sum, weight = self._total_progress()
        loss = loss_sum / (weight or 1.0)
        self.epoch, self._progress = self.epoch + 1, _Progress()

        (all_tokens,) = sum_over_ranks([num_tokens], self.device)
        if not math.isfinite(loss):
            raise TrainingError(
                f"The loss of epoch {self.epoch} is {loss}; lower optimiser.learning_rate "
                f"(now {self.recipe.optimiser.learning_rate}) or train in fp32."
            )
        elapsed = time.perf_counter() - start
        hr10, ndcg10 = self._validate_if_due()
        windows = (self.steps_per_epoch - first) * self.recipe.batch_size
        return EpochReport(
            self.epoch,
            loss,
            ndcg10,
            hr10,
            windows / elapsed,
            all_tokens / elapsed,
            self._learning_rate(),
        )

    def add_up_progress(self) -> None:
        """Adds up over the ranks what the epoch has brought so far; every rank calls it before one
        of them takes `state()` within an epoch.
        """
        totals = self._total_progress()
        # On from here the first rank alone carries what was before.
        self._progress = _Progress(self.step, *(totals if self.rank == 0 else (0.0, 0.0)))

    def validate(self) -> tuple[float, float]:
        """(HR@10, NDCG@10) over the validation users, each rank ranking its part of them."""
        users = self._validation_users[self.rank :: self.world_size]
        sums = [0.0, 0.0, float(len(users))]
        if len(users):
            scorer = ModelScorer(self.model, self._known_at_request_F, dtype=self.dtype)
            ranks_N = rank_targets(
                scorer,
                self._store,
                users,
                self._split.validation_U[users],
                filter_seen=self._filter_seen,
            ).ranks_N
            is_hit_N = ranks_N <= 10
            sums[:2] = [float(is_hit_N.sum()), float((is_hit_N / np.log2(1 + ranks_N)).sum())]
        hits, gains, count = sum_over_ranks(sums, self.device)
        return hits / max(count, 1), gains / max(count, 1)

    def state(self) -> dict[str, Any]:
        """Everything beside the weights that a resumed run needs, as tensors and plain values."""
        return {
            "optimiser": self._optimiser.state_dict(),
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
        """Continues after the step at whose end `state()` and the weights were taken."""
        self.model.load_state_dict(weights)
        self._optimiser.load_state_dict(state["optimiser"])
        self.epoch = state["epoch"]
        progress = _Progress(**state["progress"])
        self._progress = progress if self.rank == 0 else _Progress(progress.step)
        self.best_ndcg10, self.best_epoch = state["best_ndcg10"], state["best_epoch"]
        self._validations_without_gain = state["validations_without_gain"]

    def _total_progress(self) -> tuple[float, float]:
        sums = [float(self._progress.loss_sum), float(self._progress.weight)]
        loss_sum, weight = sum_over_ranks(sums, self.device) if self.world_size > 1 else sums
        return loss_sum, weight

    def _train_step(self, places: Places) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = self._learning_rate()
        pieces = self._assemble(places)
        # Every rank hides the same ids.
        self.model.hide_ids(pieces[0].draws.generator(Purpose.HIDDEN_IDS))
        self._optimiser.zero_grad(set_to_none=True)
        for piece in pieces:
            is_last = piece is pieces[-1]
            with contextlib.nullcontext() if is_last else self._without_exchange():
                loss = self._loss(piece)
                # Ranks are averaged over, and each brings its share of the sum.
                torch.autograd.backward(loss * (piece.share * self.world_size))
            self._progress.loss_sum += loss.detach() * piece.batch.weight
            self._progress.weight += piece.batch.weight
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimiser.clip_norm)
        self._optimiser.step()
        self._progress.step += 1

    def _assemble(self, places: Places) -> list[_Piece]:
        """The pieces of this rank's part of a global batch, and where they lie in it."""
        number = self.epoch * self.steps_per_epoch + self.step
        if self.device.type == "cuda":
            torch.manual_seed(number * self.world_size + self.rank)
        parts = places.split(self.config.micro_batches)
        draws = [Draws(self.seed, number, part.rows_B) for part in parts]
        batches = [
            self._batch_maker.make(*self._windows.gather(part.starts_B, part.lengths_B), drawn)
            for part, drawn in zip(parts, draws, strict=True)
        ]
        counts = torch.tensor(
            [[len(batch.targets_M), float(batch.weight)] for batch in batches],
            dtype=torch.float64,
            device=self.device if self.world_size > 1 else "cpu",
        )
        lengths, weights = gather_rows(counts).T.tolist()
        total, mine = sum(weights) or 1.0, self.rank * len(parts)
        firsts = [int(first) for first in itertools.accumulate(lengths, initial=0)]
        whole = self._gather_targets(batches, firsts)
        return [
            _Piece(
                batch,
                draws[i],
                BatchTargets(batch.targets_M if whole is None else whole, firsts[mine + i]),
                weights[mine + i] / total,
            )
            for i, batch in enumerate(batches)
        ]

    def _gather_targets(self, batches: list[Batch], firsts: list[int]) -> Tensor | None:
        """The targets of the global batch, where negatives are among them."""
        if self._sampler is None or not self._sampler.reads_batch:
            return None
        ends = firsts[:: len(batches)]
        lengths = [end - start for start, end in itertools.pairwise(ends)]
        return gather_lists(torch.cat([batch.targets_M for batch in batches]), lengths)

    def _loss(self, piece: _Piece) -> Tensor:
        batch = piece.batch
        noise = piece.draws.noise(batch.items_BL.shape[1])
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden_BLD = self._replica(
                batch.items_BL, batch.context_BLF, batch.request_BLF, batch.seconds_BL2, noise
            )
        hidden_MD = hidden_BLD.flatten(0, 1)[batch.scored_M].to(self.dtype)
        negatives = None
        if self._sampler is not None:
            negatives = self._sampler.draw(batch.targets_M, piece.draws, piece.of_batch)
        return compute_loss(
            self.recipe.loss,
            hidden_MD,
            *self.model.output_rows(),
            batch.targets_M,
            negatives,
            batch.weights_M,
        )

    def _without_exchange(self) -> contextlib.AbstractContextManager[None]:
        if isinstance(self._replica, DistributedDataParallel):
            return self._replica.no_sync()
        return contextlib.nullcontext()

    def _refuse_empty_parts(self) -> None:
        num_parts = self.world_size * self.config.micro_batches
        if self.recipe.batch_size < num_parts:
            raise TrainingError(
                f"A batch of {self.recipe.batch_size} windows cannot be shared by "
                f"{self.world_size} workers in {self.config.micro_batches} parts each; raise "
                "batch_size or lower train.num_workers."
            )

    def _make_sampler(self, is_target_T: np.ndarray | None) -> NegativeSampler | None:
        if self.recipe.loss.kind == "full-softmax":
            return None
        config = self.recipe.loss.negatives
        positions_T = training_positions(self._store, self._split)
        if is_target_T is not None and config.source in ("in-batch", "mixed"):
            # What the batch brings are targets: an item is among them as often as it is one.
            positions_T = positions_T[is_target_T[positions_T]]
        items_T = self._store.items_T[positions_T]
        counts_I = np.bincount(items_T, minlength=len(self.model.item_bias))
        return NegativeSampler(config, torch.from_numpy(counts_I).to(self.device))

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


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bf16 when asked for, or when `auto` finds a device that multiplies it natively."""
    if precision == "auto":
        is_native = (
            torch.cuda.is_bf16_supported()
            if device.type == "cuda"
            else torch.cpu._is_avx512_bf16_supported()
        )
        precision = "bf16" if is_native else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _count_from_first(timestamps_T: np.ndarray, moment_s: int | None) -> int:
    """A moment on the scale of `context.count_seconds`; 0 for none."""
    times_T = timestamps_T[timestamps_T != NO_TIME]
    if moment_s is None or len(times_T) == 0:
        return 0
    return max(1, (moment_s * 1_000_000 - int(times_T.min())) // 1_000_000 + 1)


def _mark_targets(
    store: TokenStore, targets: TargetEvents | None, new_since: int
) -> np.ndarray | None:
    """Which events are learned to be predicted, bool `[T]`; None for all."""
    if targets is None and not new_since:
        return None
    is_target_T = np.ones(store.num_tokens, bool)
    if targets is not None:
        is_target_T &= targets.mark(store.context_TF)
    if new_since:
        is_target_T &= count_seconds(store.timestamps_T) >= new_since
    return is_target_T


def _sample_users(targets_U: np.ndarray, num_users: int, seed: int) -> np.ndarray:
    users = np.flatnonzero(targets_U >= 0)
    if len(users) <= num_users:
        return users
    return np.sort(np.random.default_rng(seed).choice(users, num_users, replace=False))

"""The training loop, in plain PyTorch: one object that trains an epoch, validates and saves itself.

It knows ranks only through `torch.distributed`; `ray_jobs.train` runs one of these on each worker.
"""

import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recsys.batches import Batch, TargetWeights, make_batch
from recsys.errors import TrainingError
from recsys.evaluation import rank_targets
from recsys.interactions import training_positions
from recsys.losses import compute_loss
from recsys.model import NextItemModel
from recsys.negatives import NegativeSampler
from recsys.recipe import OptimiserConfig, Recipe
from recsys.scorer import ModelScorer
from recsys.splits import Split
from recsys.targets import TargetEvents
from recsys.tokens import TokenStore
from recsys.windows import Windows

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
    """auto: bf16 where the device multiplies it natively, else fp32."""


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


class Trainer:
    """Trains `model` on the windows of a token store.

    Args:
        known_at_request_F: which context fields a scored position may carry, bool.
        seed: of the order of windows, the masks, the negatives and dropout.
        device: where the tokens and the model live.
        targets: which events are predicted, and what they weigh; None: all, the same. The split
            must have been made with them.
        filter_seen: whether validation leaves items of the history out of the ranking.
        new_since_s: only events from then on are targets, seconds since the epoch.
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
        filter_seen: bool = True,
        new_since_s: int | None = None,
    ) -> None:
        self.recipe, self.config, self.seed, self.device = recipe, config, seed, device
        self.rank, self.world_size = _rank_and_world_size()
        self.model = model.to(device)
        self.dtype = choose_dtype(config.precision, device)
        self._store, self._split = store, split
        self._known_at_request_F = known_at_request_F
        self._targets = None if targets is None else TargetWeights.of(targets, device)
        self._filter_seen = filter_seen

        # Of a causal window one event at least is a target and no input, so it is one event longer.
        window = recipe.model.max_len + (recipe.model.attention == "causal")
        is_target_T = None if targets is None else targets.mark(store.context_TF)
        if new_since_s is not None:
            is_new_T = store.timestamps_T >= new_since_s * 1_000_000
            is_target_T = is_new_T if is_target_T is None else is_new_T & is_target_T
        self._windows = Windows(store, split, window, device, is_target_T)
        if len(self._windows) == 0:
            raise TrainingError(
                "No user has two training events, the later one a target; there is nothing to "
                "learn from."
            )
        self._sampler = self._make_sampler(is_target_T)
        self._validation_users = _sample_users(split.validation_U, config.validation_users, seed)
        self._replica: nn.Module = self.model
        if self.world_size > 1:
            # Buffers are the same everywhere; the attributes of millions of items would travel.
            self._replica = DistributedDataParallel(self.model, broadcast_buffers=False)
        self._optimiser = make_optimiser(self.model, recipe.optimiser)
        self.local_batch_size = max(1, recipe.batch_size // self.world_size)
        self.steps_per_epoch = self._windows.num_batches(self.local_batch_size, self.world_size)
        self.epoch = 0
        self.best_ndcg10 = -math.inf
        self.best_epoch = 0
        self._validations_without_gain = 0

    @property
    def should_stop(self) -> bool:
        """Whether the plan is done or validation stopped improving."""
        is_done = self.epoch >= self.config.max_epochs
        return is_done or self._validations_without_gain >= self.config.patience

    def train_epoch(self) -> EpochReport:
        """Trains one epoch on every rank, then validates where it is due."""
        start = time.perf_counter()
        generator = self._seed_epoch()
        self.model.train()
        loss_sum = torch.zeros((), device=self.device)
        weight: Tensor | int = 0
        num_tokens = 0
        known_F = torch.from_numpy(self._known_at_request_F).to(self.device)
        for starts_B, lengths_B in self._windows.batches(
            self.local_batch_size,
            self.seed + self.epoch,
            rank=self.rank,
            world_size=self.world_size,
        ):
            window = self._windows.gather(starts_B, lengths_B)
            batch = make_batch(self.recipe.objective, *window, known_F, generator, self._targets)
            loss_sum += self._step(batch, generator) * batch.weight
            weight += batch.weight
            num_tokens += int(lengths_B.sum())
        self.epoch += 1

        totals = _sum_over_ranks([float(loss_sum), float(weight), num_tokens], self.device)
        loss = totals[0] / (totals[1] or 1.0)
        if not math.isfinite(loss):
            raise TrainingError(
                f"The loss of epoch {self.epoch} is {loss}; lower optimiser.learning_rate "
                f"(now {self.recipe.optimiser.learning_rate}) or train in fp32."
            )
        elapsed = time.perf_counter() - start
        hr10, ndcg10 = self._validate_if_due()
        windows = self.steps_per_epoch * self.local_batch_size * self.world_size
        return EpochReport(
            self.epoch,
            loss,
            ndcg10,
            hr10,
            windows / elapsed,
            totals[2] / elapsed,
            self._learning_rate(),
        )

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
        hits, gains, count = _sum_over_ranks(sums, self.device)
        return hits / max(count, 1), gains / max(count, 1)

    def state(self) -> dict[str, Any]:
        """Everything beside the weights that a resumed run needs, as tensors and plain values."""
        return {
            "optimiser": self._optimiser.state_dict(),
            "epoch": self.epoch,
            "best_ndcg10": self.best_ndcg10,
            "best_epoch": self.best_epoch,
            "validations_without_gain": self._validations_without_gain,
        }

    def restore(self, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Continues after the epoch at whose end `state()` and the weights were taken."""
        self.model.load_state_dict(weights)
        self._optimiser.load_state_dict(state["optimiser"])
        self.epoch = state["epoch"]
        self.best_ndcg10, self.best_epoch = state["best_ndcg10"], state["best_epoch"]
        self._validations_without_gain = state["validations_without_gain"]

    def _step(self, batch: Batch, generator: torch.Generator) -> Tensor:
        for group in self._optimiser.param_groups:
            group["lr"] = self._learning_rate()
        self.model.hide_ids(generator)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden_BLD = self._replica(
                batch.items_BL, batch.context_BLF, batch.request_BLF, batch.seconds_BL2
            )
        hidden_MD = hidden_BLD.flatten(0, 1)[batch.scored_M].to(self.dtype)
        table_ID, bias_I = self.model.output_rows()
        negatives = self._sampler.draw(batch.targets_M, generator) if self._sampler else None
        loss = compute_loss(
            self.recipe.loss,
            hidden_MD,
            table_ID,
            bias_I,
            batch.targets_M,
            negatives,
            batch.weights_M,
        )
        self._optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss * self._weight_of(batch))
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimiser.clip_norm)
        self._optimiser.step()
        self._num_steps += 1
        return loss.detach()

    def _weight_of(self, batch: Batch) -> float:
        # DDP averages over ranks; ranks whose scored positions weigh more count for more.
        if self.world_size == 1:
            return 1.0
        weight = float(batch.weight)
        (total,) = _sum_over_ranks([weight], self.device)
        return weight * self.world_size / (total or 1.0)

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

    def _seed_epoch(self) -> torch.Generator:
        # Every epoch starts its generators afresh, so that a resumed run draws what an unbroken one
        # draws.
        seed = np.random.SeedSequence([self.seed, self.epoch, self.rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        self._num_steps = self.epoch * self.steps_per_epoch
        return torch.Generator(self.device).manual_seed(int(seed) + 1)

    def _learning_rate(self) -> float:
        total = self.config.max_epochs * self.steps_per_epoch
        return scheduled_rate(self.recipe.optimiser, self._num_steps, total)

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


def scheduled_rate(config: OptimiserConfig, step: int, total: int) -> float:
    """Learning rate of a step: linear warm-up, then a cosine down to `final_share`."""
    warmup = config.warmup_share * total
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_share + (1 - config.final_share) * cosine)


def make_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """Fused AdamW; matrices of linear layers decay, nothing else does."""
    # In the order of the modules: a checkpoint names parameters by their place.
    decayed = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    others = [p for p in model.parameters() if not any(p is weight for weight in decayed)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


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


def save_checkpoint(folder: Path, trainer: Trainer) -> None:
    """Weights and state of one rank's trainer; all ranks hold the same."""
    torch.save(
        {"weights": trainer.model.state_dict(), "state": trainer.state()}, folder / "trainer.pt"
    )


def load_checkpoint(folder: Path, trainer: Trainer) -> None:
    """Continues from `save_checkpoint`; only tensors and plain values are read, never code."""
    saved = torch.load(folder / "trainer.pt", map_location=trainer.device, weights_only=True)
    trainer.restore(saved["state"], saved["weights"])


def _rank_and_world_size() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return cast(list[float], sums.tolist())


def _sample_users(targets_U: np.ndarray, num_users: int, seed: int) -> np.ndarray:
    users = np.flatnonzero(targets_U >= 0)
    if len(users) <= num_users:
        return users
    return np.sort(np.random.default_rng(seed).choice(users, num_users, replace=False))

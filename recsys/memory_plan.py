"""What a training will hold in memory, worked out before it starts, so that `memory_advice` refuses
one that cannot fit with figures, instead of it being killed without.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from recsys.batches import Batch, BatchMaker, ObjectiveConfig
from recsys.catalogue import NUM_SPECIAL
from recsys.evaluation import block_size
from recsys.heap import Heap
from recsys.losses import block_bytes
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.randomness import Draws
from recsys.recipe import Recipe

_SAMPLE_WINDOWS = 2
_SAMPLE_ROWS = 500
_COUNTED_WINDOWS = 512
_TRANSIENT = 1.25
"""What a backward pass holds beside what the forward pass kept for it, as measured."""
_COPIES_OF_ROWS = 6
"""Gradients of the rows and what `torch.optim.SparseAdam` computes of them at a time."""
_HEAP = 1.0
"""Freed blocks that the heap of a CPU's process keeps and cannot use again, in shares of what loss
and encoder take and free in each step: a margin, as measured; see `recsys.heap`."""
_GB = 1e9


@dataclass(frozen=True)
class Workload:
    """What one worker trains on."""

    num_rows: int
    """Of the item table."""
    num_tokens: int
    context_sizes: tuple[int, ...]
    dtype: torch.dtype
    micro_batches: int = 1
    num_workers: int = 1
    is_cuda: bool = False
    has_bf16: bool = False
    """Whether the device multiplies it natively."""
    has_weights: bool = False
    """Whether training starts from weights, which the model has to fit."""
    validation_users: int = 0
    """Of all workers."""

    def share(self, recipe: Recipe) -> int:
        """Windows of a batch that are this worker's."""
        return math.ceil(recipe.batch_size / self.num_workers)

    def windows(self, recipe: Recipe) -> int:
        """Windows that are computed at once."""
        return math.ceil(self.share(recipe) / self.micro_batches)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what they are for; those for a validation are what it needs beyond a step."""

    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / _GB:.2f}" for name, size in self.parts.items())
        return f"{self.total_bytes / _GB:.2f} GB ({parts})"


def plan_memory(recipe: Recipe, workload: Workload) -> MemoryPlan:
    """The most that a worker holds at a time, the process itself and its libraries left out."""
    weights, of_items, codes = _count_weights(
        recipe.model, workload.num_rows, workload.context_sizes
    )
    is_touched = recipe.optimiser.item_rows == "touched"
    dense = weights - of_items * is_touched
    # Gradients are views of the buckets of DDP, which makes these anew after the first step: both
    # are counted, since what is held then was not measured.
    copies = 1 if workload.num_workers == 1 else 2
    loss, activations = _loss_bytes(recipe, workload), _activation_bytes(recipe, workload)
    gradients = dense * copies
    if recipe.loss.kind != "full-softmax" and not is_touched:
        # Inputs, targets and negatives are looked up apart. Each gives a gradient of all rows, and
        # two of them are there while they are added up, beside that of an earlier part.
        gradients += of_items * (1 + (workload.micro_batches > 1))
    of_step = {
        "gradients": 4 * gradients,
        "touched": _touched_bytes(recipe, workload) if is_touched else 0,
        "loss": loss,
        "activations": activations,
    }
    # What a step needs is free again when the model is validated.
    beyond_step = _validation_bytes(workload) - sum(of_step.values())
    return MemoryPlan(
        {
            "weights": 4 * weights + codes,
            "moments": 8 * weights,
            **of_step,
            "validation": max(0, beyond_step),
            "heap": 0 if workload.is_cuda else int(_HEAP * (loss + activations)),
            "tokens": workload.num_tokens * (8 + len(workload.context_sizes)),
        }
    )


@lru_cache
def _count_weights(
    config: ModelConfig, num_rows: int, context_sizes: tuple[int, ...]
) -> tuple[int, int, int]:
    """Weights, those that have a row an item, and bytes of what is not learned."""
    with torch.device("meta"):
        model = NextItemModel(config, num_rows, context_sizes)
    weights = sum(parameter.numel() for parameter in model.parameters())
    of_items = sum(table.numel() for table in model.item_parameters)
    return weights, of_items, sum(buffer.nbytes for buffer in model.buffers())


def _validation_bytes(workload: Workload) -> int:
    """The scores of a block of users, fp32."""
    users = math.ceil(workload.validation_users / workload.num_workers)
    return 4 * workload.num_rows * min(users, block_size(workload.num_rows))


def _loss_bytes(recipe: Recipe, workload: Workload) -> int:
    element = torch.empty(0, dtype=workload.dtype).element_size()
    if recipe.loss.kind == "full-softmax":
        return _full_softmax_bytes(recipe, workload, element)
    return _sampled_loss_bytes(recipe, workload, element)


def _full_softmax_bytes(recipe: Recipe, workload: Workload, element: int) -> int:
    num_rows, dim = workload.num_rows, recipe.model.dim
    # The gradient before it is scaled, the table in the dtype of the states and, put together from
    # codes, the table and its gradient. On top of the gradient of an earlier part of the batch it
    # is there scaled, too.
    copies = 4 + element * (workload.dtype != torch.float32)
    if workload.micro_batches > 1:
        copies = 8
    copies += 8 * (recipe.model.item_codes is not None)
    block = recipe.loss.block_size
    of_block = block_bytes(workload.is_cuda, num_rows, element)
    if block is not None:
        of_block = block * num_rows * element
    M, _, _ = _count_scores(recipe, workload)
    return num_rows * dim * copies + 2 * min(of_block, M * num_rows * element)


def _sampled_loss_bytes(recipe: Recipe, workload: Workload, element: int) -> int:
    """The larger of two moments: when a position's negatives are compared with its target, and when
    the gradient of their vectors is there.
    """
    M, N, G = _count_scores(recipe, workload)
    vectors = G * N * recipe.model.dim
    # The scores and whose they are (int64), which of them count, and in a sampled softmax what is
    # expected of them and the scores without it.
    of_score = 4 + 4 + 8 + 1 + 4 * (recipe.loss.kind == "sampled-softmax")
    is_rounded = element < 4
    forward = element * vectors + of_score * M * N
    backward = (2 * element + 4 * is_rounded) * vectors + (4 + 4 + 1) * M * N
    return max(forward, backward)


def _touched_bytes(recipe: Recipe, workload: Workload) -> int:
    """Copies of the rows that a step looks at at most, all parts of the batch together, and of
    those of all workers the gradients and what a lazy Adam makes of them.
    """
    _, N, G = _count_scores(recipe, workload)
    # A target is an item of its window.
    of_windows = workload.share(recipe) * (recipe.model.max_len + 1)
    mine = min(workload.num_rows, of_windows + workload.micro_batches * G * N)
    merged = min(workload.num_rows, workload.num_workers * mine)
    gathered = workload.num_workers * mine * (workload.num_workers > 1)
    copies = mine + gathered + _COPIES_OF_ROWS * merged
    return 4 * copies * (recipe.model.dim + 1)


def _count_scores(recipe: Recipe, workload: Workload) -> tuple[int, int, int]:
    """Positions that are scored at once, their negatives, and the draws of these."""
    chosen = recipe.loss.negatives
    per_window = _scored_per_window(recipe.model, recipe.objective)
    M = math.ceil(per_window * workload.windows(recipe))
    in_batch = math.ceil(per_window * recipe.batch_size)
    N = {"in-batch": in_batch, "mixed": chosen.num + in_batch}.get(chosen.source, chosen.num)
    return M, N, 1 if chosen.group_size is None else math.ceil(M / chosen.group_size)


@lru_cache
def _scored_per_window(config: ModelConfig, objective: ObjectiveConfig) -> float:
    """Positions of a window of full length that are scored, in the mean of many."""
    batch = _make_batch(config, objective, _COUNTED_WINDOWS, _SAMPLE_ROWS, 0)
    return len(batch.targets_M) / _COUNTED_WINDOWS


def _make_batch(
    config: ModelConfig,
    objective: ObjectiveConfig,
    num_windows: int,
    num_rows: int,
    num_fields: int,
) -> Batch:
    """Random windows of full length."""
    B, L, F = num_windows, config.max_len, num_fields
    # Of a causal window the last event is a target alone.
    L += config.attention == "causal"
    items_BL = torch.randint(
        NUM_SPECIAL, num_rows, (B, L), generator=torch.Generator().manual_seed(0)
    )
    zeros = torch.zeros(B, L, F, dtype=torch.int64), torch.zeros(B, L, dtype=torch.int32)
    maker = BatchMaker(objective, torch.zeros(F, dtype=torch.bool), num_rows)
    return maker.make(items_BL, *zeros, Draws(0, 0, torch.arange(B)))


def _activation_bytes(recipe: Recipe, workload: Workload) -> int:
    """What the encoder keeps for the backward pass and holds in it."""
    num_rows = min(workload.num_rows, _SAMPLE_ROWS)
    context_sizes, dtype = workload.context_sizes, workload.dtype
    of_window = _kept_per_window(recipe.model, recipe.objective, num_rows, context_sizes, dtype)
    return int(of_window * _TRANSIENT * workload.windows(recipe))


@lru_cache
def _kept_per_window(
    config: ModelConfig,
    objective: ObjectiveConfig,
    num_rows: int,
    context_sizes: tuple[int, ...],
    dtype: torch.dtype,
) -> float:
    """What the encoder keeps for the backward pass, measured on two windows of full length."""
    # These are the first products of a process that plans before it trains.
    Heap.bound_kernels()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model = NextItemModel(config, num_rows, context_sizes).train()
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    batch = _make_batch(config, objective, _SAMPLE_WINDOWS, num_rows, len(context_sizes))
    noise = Draws(0, 0, torch.arange(_SAMPLE_WINDOWS)).noise(batch.items_BL.shape[1])
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        model(
            batch.items_BL,
            batch.context_BLF,
            batch.request_BLF,
            batch.seconds_BL2,
            noise,
            batch.scored_M,
        )
    of_sample = sum(size for pointer, size in kept.items() if pointer not in own)
    return of_sample / _SAMPLE_WINDOWS

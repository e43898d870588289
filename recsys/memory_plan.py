"""What a training will hold in memory, worked out before it starts, so that one that cannot fit is
refused with figures instead of killed without.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from recsys.batches import Batch, BatchMaker
from recsys.catalogue import NUM_SPECIAL
from recsys.errors import TrainingError
from recsys.losses import block_bytes
from recsys.model import NextItemModel
from recsys.randomness import Draws
from recsys.recipe import Recipe

_SAMPLE_WINDOWS = 2
_SAMPLE_ROWS = 500
_COUNTED_WINDOWS = 512
_TRANSIENT = 1.25
"""What a backward pass holds beside what the forward pass kept for it, as measured."""
_GB = 1e9


@dataclass(frozen=True)
class Workload:
    """What one worker trains on."""

    num_rows: int
    """Of the item table."""
    num_tokens: int
    context_sizes: tuple[int, ...]
    windows: int
    """Of a batch that are computed at once."""
    dtype: torch.dtype
    num_workers: int = 1
    is_cuda: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what they are for."""

    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / _GB:.2f}" for name, size in self.parts.items())
        return f"{self.total_bytes / _GB:.2f} GB ({parts})"


def plan_memory(recipe: Recipe, workload: Workload) -> MemoryPlan:
    """The most that a worker holds at a time, the process itself and its libraries left out."""
    with torch.device("meta"):
        model = NextItemModel(recipe.model, workload.num_rows, workload.context_sizes)
    of_items = sum(table.numel() for table in model.item_parameters)
    weights = sum(parameter.numel() for parameter in model.parameters())
    is_touched = recipe.optimiser.item_rows == "touched"
    dense = weights - of_items * is_touched
    # DDP exchanges gradients from buckets of its own.
    copies = 1 if workload.num_workers == 1 else 2
    codes = sum(buffer.nbytes for buffer in model.buffers())
    return MemoryPlan(
        {
            "weights": 4 * weights + codes,
            "moments": 8 * weights,
            "gradients": 4 * dense * copies,
            "touched": _touched_bytes(recipe, workload) if is_touched else 0,
            "loss": _loss_bytes(recipe, workload),
            "activations": _activation_bytes(recipe, workload),
            "tokens": workload.num_tokens * (8 + len(workload.context_sizes)),
        }
    )


def refuse_what_cannot_fit(recipe: Recipe, workload: Workload, available_bytes: int) -> MemoryPlan:
    """The plan. Raises: TrainingError with its figures, and with two settings that would fit."""
    plan = plan_memory(recipe, workload)
    if plan.total_bytes <= available_bytes:
        return plan
    fitting = []
    for setting, other in _smaller(recipe):
        needed = plan_memory(other, workload).total_bytes
        if needed <= available_bytes:
            fitting.append(f"{setting} ({needed / _GB:.2f} GB)")
    advice = (
        f"{' or '.join(fitting[:2])} would fit"
        if fitting
        else "nothing that can be set would make it fit: use a larger device"
    )
    raise TrainingError(
        f"Training would need {plan} where {available_bytes / _GB:.2f} GB are free; {advice}."
    )


def _smaller(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Settings that need less, the least change of the result first."""
    content = recipe.model_dump(exclude_unset=True)

    def change(**sections: dict[str, Any]) -> Recipe:
        merged = {name: {**content.get(name, {}), **section} for name, section in sections.items()}
        return Recipe.model_validate(content | merged)

    is_full = recipe.loss.kind == "full-softmax"
    if recipe.optimiser.item_rows == "all" and not is_full:
        yield "optimiser.item_rows = 'touched'", change(optimiser={"item_rows": "touched"})
    if is_full:
        sampled = content | {"loss": {"kind": "sampled-softmax"}}
        sampled["optimiser"] = {**content.get("optimiser", {}), "item_rows": "touched"}
        yield (
            "loss.kind = 'sampled-softmax' with optimiser.item_rows = 'touched'",
            Recipe.model_validate(sampled),
        )
    length = next((n for n in (8, 4, 2) if recipe.model.dim % n == 0), None)
    if recipe.model.item_codes is None and length is not None:
        codes = {"item_codes": {"length": length}}
        yield f"model.item_codes = {{ length = {length} }}", change(model=codes)
    for share in (2, 4, 8):
        if recipe.batch_size >= 2 * share:
            size = recipe.batch_size // share
            yield f"batch_size = {size}", Recipe.model_validate(content | {"batch_size": size})


def _loss_bytes(recipe: Recipe, workload: Workload) -> int:
    element = torch.empty(0, dtype=workload.dtype).element_size()
    if recipe.loss.kind == "full-softmax":
        return _full_softmax_bytes(recipe, workload, element)
    return _sampled_loss_bytes(recipe, workload, element)


def _full_softmax_bytes(recipe: Recipe, workload: Workload, element: int) -> int:
    num_rows, dim = workload.num_rows, recipe.model.dim
    # The gradient before it is scaled, the table in the dtype of the states and, put together from
    # codes, the table and its gradient.
    copies = 4 + element * (workload.dtype != torch.float32)
    copies += 8 * (recipe.model.item_codes is not None)
    block = recipe.loss.block_size
    of_block = block_bytes(workload.is_cuda, num_rows, element)
    if block is not None:
        of_block = block * num_rows * element
    return num_rows * dim * copies + 2 * of_block


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
    """Copies of the rows that a step looks at at most, and their gradients."""
    _, N, G = _count_scores(recipe, workload)
    # A target is an item of its window.
    looked_at = workload.windows * (recipe.model.max_len + 1) + G * N
    return 2 * 4 * min(workload.num_rows, looked_at) * (recipe.model.dim + 1)


def _count_scores(recipe: Recipe, workload: Workload) -> tuple[int, int, int]:
    """Positions that are scored at once, their negatives, and the draws of these."""
    chosen, per_window = recipe.loss.negatives, _scored_per_window(recipe)
    M = math.ceil(per_window * workload.windows)
    in_batch = math.ceil(per_window * recipe.batch_size)
    N = {"in-batch": in_batch, "mixed": chosen.num + in_batch}.get(chosen.source, chosen.num)
    return M, N, 1 if chosen.group_size is None else math.ceil(M / chosen.group_size)


@lru_cache
def _scored_per_window(recipe: Recipe) -> float:
    """Positions of a window of full length that are scored, in the mean of many."""
    batch = _make_batch(recipe, _COUNTED_WINDOWS, _SAMPLE_ROWS, 0)
    return len(batch.targets_M) / _COUNTED_WINDOWS


def _make_batch(recipe: Recipe, num_windows: int, num_rows: int, num_fields: int) -> Batch:
    """Random windows of full length."""
    B, L, F = num_windows, recipe.model.max_len, num_fields
    # Of a causal window the last event is a target alone.
    L += recipe.model.attention == "causal"
    items_BL = torch.randint(
        NUM_SPECIAL, num_rows, (B, L), generator=torch.Generator().manual_seed(0)
    )
    zeros = torch.zeros(B, L, F, dtype=torch.int64), torch.zeros(B, L, dtype=torch.int32)
    maker = BatchMaker(recipe.objective, torch.zeros(F, dtype=torch.bool), num_rows)
    return maker.make(items_BL, *zeros, Draws(0, 0, torch.arange(B)))


def _activation_bytes(recipe: Recipe, workload: Workload) -> int:
    """What the encoder keeps for the backward pass, measured on two windows of full length."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    num_rows = min(workload.num_rows, _SAMPLE_ROWS)
    model = NextItemModel(recipe.model, num_rows, workload.context_sizes).train()
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    batch = _make_batch(recipe, _SAMPLE_WINDOWS, num_rows, len(workload.context_sizes))
    noise = Draws(0, 0, torch.arange(_SAMPLE_WINDOWS)).noise(batch.items_BL.shape[1])
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", workload.dtype, enabled=workload.dtype != torch.float32),
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
    return int(of_sample * _TRANSIENT / _SAMPLE_WINDOWS * workload.windows)

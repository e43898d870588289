"""What a training will hold in memory, worked out before it starts, so that one that cannot fit is
refused with figures instead of killed without.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recsys.batches import BatchMaker
from recsys.catalogue import NUM_SPECIAL
from recsys.errors import TrainingError
from recsys.losses import block_bytes, compute_loss
from recsys.model import NextItemModel
from recsys.negatives import BatchTargets, NegativeSampler
from recsys.randomness import Draws
from recsys.recipe import Recipe

_SAMPLE_WINDOWS = 2
_SAMPLE_ROWS = 500
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
    if recipe.loss.kind != "full-softmax":
        return 0
    num_rows, dim = workload.num_rows, recipe.model.dim
    element = torch.empty(0, dtype=workload.dtype).element_size()
    # The gradient before it is scaled, the table in the dtype of the states and, put together from
    # codes, the table and its gradient.
    copies = 4 + element * (workload.dtype != torch.float32)
    copies += 8 * (recipe.model.item_codes is not None)
    block = recipe.loss.block_size
    of_block = block_bytes(workload.is_cuda, num_rows, element)
    if block is not None:
        of_block = block * num_rows * element
    return num_rows * dim * copies + 2 * of_block


def _activation_bytes(recipe: Recipe, workload: Workload) -> int:
    """What the forward pass keeps for the backward pass, measured on two windows of full length."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    num_rows = min(workload.num_rows, _SAMPLE_ROWS)
    model = NextItemModel(recipe.model, num_rows, workload.context_sizes).train()
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    B, L, F = _SAMPLE_WINDOWS, recipe.model.max_len + 1, len(workload.context_sizes)
    draws = Draws(0, 0, torch.arange(B))
    items_BL = torch.randint(NUM_SPECIAL, num_rows, (B, L))
    zeros = torch.zeros(B, L, F, dtype=torch.int64), torch.zeros(B, L, dtype=torch.int32)
    maker = BatchMaker(recipe.objective, torch.zeros(F, dtype=torch.bool), num_rows)
    batch = maker.make(items_BL, *zeros, draws)
    if recipe.model.attention == "bidirectional":
        batch = maker.make(items_BL[:, 1:], zeros[0][:, 1:], zeros[1][:, 1:], draws)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", workload.dtype, enabled=workload.dtype != torch.float32),
    ):
        hidden_MD = model(
            batch.items_BL,
            batch.context_BLF,
            batch.request_BLF,
            batch.seconds_BL2,
            draws.noise(batch.items_BL.shape[1]),
            batch.scored_M,
        ).to(workload.dtype)
        if recipe.loss.kind != "full-softmax":
            counts_I = torch.ones(num_rows, dtype=torch.int64)
            sampler = NegativeSampler(recipe.loss.negatives, counts_I)
            negatives = sampler.draw(batch.targets_M, draws, BatchTargets(batch.targets_M))
            rows = model.output_rows()
            compute_loss(recipe.loss, hidden_MD, *rows, batch.targets_M, negatives)
    of_sample = sum(size for pointer, size in kept.items() if pointer not in own)
    return int(of_sample * _TRANSIENT / _SAMPLE_WINDOWS * workload.windows)

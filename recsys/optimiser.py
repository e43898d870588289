"""The optimiser and its schedule."""

import math
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from recsys.touched_rows import TouchedRows


class OptimiserConfig(BaseModel):
    """AdamW with warm-up and cosine; no weight decay on biases, norms and embeddings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_share: float = Field(0.05, ge=0, lt=1)
    """Share of all steps during which the rate climbs from 0."""
    final_share: float = Field(0.05, ge=0, le=1)
    """Share of the learning rate that is left at the end of the cosine."""
    clip_norm: float = Field(1.0, gt=0)
    item_rows: Literal["all", "touched"] = "all"
    """touched: a step updates, and ranks exchange, only the rows of items that it looked at, with
    their moments (lazy Adam), so that its cost does not grow with the catalogue. For sampled
    losses; a full softmax looks at every item."""


def scheduled_rate(config: OptimiserConfig, step: int, total: int) -> float:
    """Learning rate of a step: linear warm-up, then a cosine down to `final_share`."""
    warmup = config.warmup_share * total
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_share + (1 - config.final_share) * cosine)


class Optimiser:
    """Fused AdamW; matrices of linear layers decay, nothing else does. Rows of `touched` are
    updated by a lazy Adam.
    """

    def __init__(
        self, model: nn.Module, config: OptimiserConfig, touched: TouchedRows | None = None
    ) -> None:
        self._touched, self._clip_norm = touched, config.clip_norm
        tables = [] if touched is None else touched.tables
        # In the order of the modules: a checkpoint names parameters by their place.
        decayed = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        others = [p for p in model.parameters() if not _is_among(p, [*decayed, *tables])]
        self._dense = [*decayed, *others]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        rate, betas = config.learning_rate, config.betas
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
        ]
        if tables:
            self.parts.append(torch.optim.SparseAdam(tables, lr=rate, betas=betas))

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self, rate: float) -> None:
        """Updates the model by its gradients, scaled down to `clip_norm`. Every rank calls it."""
        gradients = [p.grad for p in self._dense if p.grad is not None]
        of_rows = self._put_rows()
        _clip([*gradients, *of_rows], self._clip_norm)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()

    def state(self) -> list[dict[str, Any]]:
        """Moments and counts, as tensors and plain values."""
        return [part.state_dict() for part in self.parts]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Raises: ValueError when it is of another model."""
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)

    def _put_rows(self) -> list[Tensor]:
        if self._touched is None:
            return []
        rows_U, gradients = self._touched.close()
        for table, gradient_UD in zip(self._touched.tables, gradients, strict=True):
            table.grad = torch.sparse_coo_tensor(
                rows_U[None], gradient_UD, table.shape, is_coalesced=True, check_invariants=False
            )
        return gradients


def _clip(gradients: list[Tensor], clip_norm: float) -> None:
    norm = nn.utils.get_total_norm(gradients)
    # A product with 1 where nothing is clipped spares a GPU the wait for the norm.
    scale = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale)


def _is_among(parameter: nn.Parameter, others: list[Any]) -> bool:
    return any(parameter is other for other in others)

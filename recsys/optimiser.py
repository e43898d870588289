"""The optimiser and its schedule."""

import math

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn


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

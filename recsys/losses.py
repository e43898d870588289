"""Losses over scored positions: hidden states against the item table. Sums are kept in fp32.

Every loss is the mean over the M scored positions and 0 when there is none.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from recsys.catalogue import NUM_SPECIAL


class LossConfig(BaseModel):
    """Which loss, and its own parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["full-softmax", "sampled-softmax"] = "full-softmax"
    num_negatives: int = Field(256, ge=1)
    """sampled-softmax: uniform negatives, drawn once a batch and shared by its positions."""
    block_size: int = Field(2048, ge=1)
    """full-softmax: scored positions whose logits exist at the same time."""


class _FullSoftmax(torch.autograd.Function):
    """Cross-entropy over all items in blocks of positions: no [M, I] matrix is ever kept.

    Gradients are computed together with the loss, block by block, so that the backward pass only
    scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        table_ID: Tensor,
        bias_I: Tensor,
        targets_M: Tensor,
        block_size: int,
    ) -> Tensor:
        loss = hidden_MD.new_zeros((), dtype=torch.float32)
        grad_hidden_MD = torch.empty_like(hidden_MD)
        grad_table_ID = torch.zeros_like(table_ID, dtype=torch.float32)
        grad_bias_I = torch.zeros_like(bias_I, dtype=torch.float32)
        weights_ID = table_ID.to(hidden_MD.dtype)
        for start in range(0, len(targets_M), block_size):
            block = slice(start, start + block_size)
            logits_MI = (hidden_MD[block] @ weights_ID.T).float().add_(bias_I)
            targets_M1 = targets_M[block, None]
            log_probs_MI = torch.log_softmax(logits_MI, dim=1)
            loss -= log_probs_MI.gather(1, targets_M1).sum()

            grad_MI = log_probs_MI.exp_()
            grad_MI.scatter_add_(1, targets_M1, grad_MI.new_full(targets_M1.shape, -1.0))
            grad_bias_I += grad_MI.sum(0)
            grad_MI = grad_MI.to(hidden_MD.dtype)
            grad_hidden_MD[block] = grad_MI @ weights_ID
            grad_table_ID += grad_MI.T @ hidden_MD[block]

        count = max(len(targets_M), 1)
        ctx.save_for_backward(grad_hidden_MD, grad_table_ID, grad_bias_I)
        ctx.count, ctx.table_dtype = count, table_ID.dtype
        return loss / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_MD, grad_table_ID, grad_bias_I = ctx.saved_tensors
        scale = grad / ctx.count
        return (
            grad_hidden_MD * scale.to(grad_hidden_MD.dtype),
            (grad_table_ID * scale).to(ctx.table_dtype),
            grad_bias_I * scale,
            None,
            None,
        )


def full_softmax(
    hidden_MD: Tensor,
    table_ID: Tensor,
    bias_I: Tensor,
    targets_M: Tensor,
    *,
    block_size: int = 2048,
) -> Tensor:
    """Cross-entropy over the whole catalogue, computed in blocks of positions.

    Args:
        hidden_MD: states at the scored positions, fp32 or bf16.
        table_ID: item vectors, padding and mask rows included; these two take no part.
        bias_I: item biases, fp32.
        targets_M: int64, dense items.
    """
    loss: Tensor = _FullSoftmax.apply(  # type: ignore[no-untyped-call]
        hidden_MD, table_ID[NUM_SPECIAL:], bias_I[NUM_SPECIAL:], targets_M - NUM_SPECIAL, block_size
    )
    return loss


def sampled_softmax(
    hidden_MD: Tensor, table_ID: Tensor, bias_I: Tensor, targets_M: Tensor, negatives_N: Tensor
) -> Tensor:
    """Cross-entropy over the target and N negatives shared by all positions (Jean et al., 2015).

    Negatives are taken as uniform, so that the logQ correction is one constant: the N samples stand
    for the `I - 1` items that are not the target. A negative that equals the target is masked.
    """
    if len(targets_M) == 0:
        return (hidden_MD.sum() + table_ID[:1].sum() * 0.0).float() * 0.0
    num_others = len(table_ID) - NUM_SPECIAL - 1
    positive_M = (hidden_MD * table_ID[targets_M].to(hidden_MD.dtype)).sum(1).float() + bias_I[
        targets_M
    ]
    negative_MN = (hidden_MD @ table_ID[negatives_N].to(hidden_MD.dtype).T).float() + bias_I[
        negatives_N
    ]
    correction = torch.log(torch.tensor(num_others / len(negatives_N), device=hidden_MD.device))
    is_hit_MN = targets_M[:, None] == negatives_N
    negative_MN = (negative_MN + correction).masked_fill(is_hit_MN, float("-inf"))
    logits = torch.cat([positive_M[:, None], negative_MN], dim=1)
    return F.cross_entropy(logits, torch.zeros_like(targets_M))


def compute_loss(
    config: LossConfig,
    hidden_MD: Tensor,
    table_ID: Tensor,
    bias_I: Tensor,
    targets_M: Tensor,
    generator: torch.Generator,
) -> Tensor:
    if config.kind == "full-softmax":
        return full_softmax(hidden_MD, table_ID, bias_I, targets_M, block_size=config.block_size)
    negatives_N = torch.randint(
        NUM_SPECIAL,
        len(table_ID),
        (config.num_negatives,),
        generator=generator,
        device=hidden_MD.device,
    )
    return sampled_softmax(hidden_MD, table_ID, bias_I, targets_M, negatives_N)

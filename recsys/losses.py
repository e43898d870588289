"""Losses over scored positions: hidden states against the item table. Sums are kept in fp32.

Every loss is the mean over the M scored positions and 0 when there is none; with `weights_M`
(fp32, above 0) it is their weighted mean.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from recsys.catalogue import NUM_SPECIAL, PAD
from recsys.item_table import Rows, all_rows
from recsys.negatives import Negatives, NegativesConfig
from recsys.seen_items import SeenItems

_LEAST_POSITIONS = 64
"""Products of fewer rows waste what the other side costs to read."""


class LossConfig(BaseModel):
    """Which loss, and its own parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["full-softmax", "sampled-softmax", "bce", "gbce"] = "full-softmax"
    """full-softmax and sampled-softmax: cross-entropy; bce: each item by itself, as in SASRec;
    gbce: the same, calibrated for the share of the items that were drawn, each as likely, as in
    gSASRec."""
    negatives: NegativesConfig = NegativesConfig()
    """All but full-softmax."""
    calibration: float = Field(0.75, ge=0, le=1)
    """gbce: `t`; 0 is bce, 1 makes scores those of a full softmax."""
    prior: bool = False
    """bce, gbce: whether scores are shifted so that an untrained model takes an item for the target
    as rarely as it is. Without it training begins by pushing all scores down, for epochs."""
    exclude_seen: bool = False
    """Whether items that stand in a position's window take no part in its loss, as they take none
    in a ranking that leaves out what a user has seen; without it a model spends part of what it can
    learn on pushing them down. A target that was seen before counts. Only for a ranking that leaves
    out what was seen: the scores of those items mean nothing."""
    block_size: int | None = Field(None, ge=1)
    """full-softmax: scored positions whose logits exist at the same time; None: as many as the
    caches of a CPU hold, or 512 MiB of a GPU."""

    @model_validator(mode="after")
    def _has_its_own_parameters(self) -> "LossConfig":
        mute = {
            "negatives": self.kind == "full-softmax",
            "calibration": self.kind != "gbce",
            "prior": self.kind not in ("bce", "gbce"),
            "block_size": self.kind != "full-softmax",
        }
        for name in sorted(self.model_fields_set):
            if mute.get(name):
                raise ValueError(f"{self.kind} has no {name}; leave it out")
        return self

    @model_validator(mode="after")
    def _is_calibrated_for_its_negatives(self) -> "LossConfig":
        source = self.negatives.source
        if self.kind == "gbce" and source != "uniform":
            raise ValueError(
                f"gbce is calibrated for uniform negatives, not for {source} ones; set "
                "negatives.source to uniform, or kind to sampled-softmax, which corrects for any"
            )
        return self


class _FullSoftmax(torch.autograd.Function):
    """Cross-entropy over all items in blocks of positions: no [M, I] matrix is ever kept.

    Gradients are computed together with the loss, block by block, so that the backward pass only
    scales them. Everything of a block derives from one softmax in the dtype of the states.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        table_ID: Tensor,
        bias_I: Tensor,
        targets_M: Tensor,
        weights_M: Tensor | None,
        seen: SeenItems | None,
        block_size: int,
    ) -> Tensor:
        loss = hidden_MD.new_zeros((), dtype=torch.float32)
        grad_hidden_MD = torch.empty_like(hidden_MD)
        grad_table_ID = torch.zeros_like(table_ID, dtype=torch.float32)
        grad_bias_I = torch.zeros_like(bias_I, dtype=torch.float32)
        vectors_ID, biases_I = table_ID.to(hidden_MD.dtype), bias_I.to(hidden_MD.dtype)
        ones_1M = hidden_MD.new_ones(1, min(block_size, len(targets_M)))
        for start in range(0, len(targets_M), block_size):
            block = slice(start, start + block_size)
            logits_MI = torch.addmm(biases_I, hidden_MD[block], vectors_ID.T)
            wanted = torch.arange(len(logits_MI), device=logits_MI.device), targets_M[block]
            if seen is not None:
                _leave_out(logits_MI, seen.of_positions(block), wanted)
            probs_MI = torch.softmax(logits_MI, dim=1)
            target_M = probs_MI[wanted].float()
            # Below the smallest number the loss stays at 87; the gradient is right all the same.
            gains_M = target_M.clamp(min=torch.finfo(torch.float32).tiny).log()

            grad_MI = probs_MI
            grad_MI[wanted] = (target_M - 1).to(probs_MI.dtype)
            if weights_M is not None:
                gains_M = gains_M * weights_M[block]
                grad_MI *= weights_M[block, None]
            loss -= gains_M.sum()
            # A product with ones sums in fp32, and several times as fast as sum().
            grad_bias_I += (ones_1M[:, : len(grad_MI)] @ grad_MI)[0]
            grad_hidden_MD[block] = grad_MI @ vectors_ID
            grad_table_ID += grad_MI.T @ hidden_MD[block]

        total = max(len(targets_M), 1) if weights_M is None else _total(weights_M)
        ctx.save_for_backward(grad_hidden_MD, grad_table_ID, grad_bias_I)
        ctx.total, ctx.table_dtype = total, table_ID.dtype
        return loss / total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_MD, grad_table_ID, grad_bias_I = ctx.saved_tensors
        scale = grad / ctx.total
        return (
            grad_hidden_MD * scale.to(grad_hidden_MD.dtype),
            (grad_table_ID * scale).to(ctx.table_dtype),
            grad_bias_I * scale,
            *[None] * 4,
        )


def full_softmax(
    hidden_MD: Tensor,
    table_ID: Tensor,
    bias_I: Tensor,
    targets_M: Tensor,
    weights_M: Tensor | None = None,
    *,
    seen: SeenItems | None = None,
    block_size: int | None = None,
) -> Tensor:
    """Cross-entropy over the whole catalogue, computed in blocks of positions.

    Args:
        hidden_MD: states at the scored positions, fp32 or bf16.
        table_ID: item vectors, padding and mask rows included; these two take no part.
        bias_I: item biases, fp32.
        targets_M: int64, dense items.
        seen: what the positions see takes no part; None: every item does.
    """
    loss: Tensor = _FullSoftmax.apply(  # type: ignore[no-untyped-call]
        hidden_MD,
        table_ID[NUM_SPECIAL:],
        bias_I[NUM_SPECIAL:],
        targets_M - NUM_SPECIAL,
        weights_M,
        seen,
        block_size or _fitting_block(hidden_MD, len(table_ID)),
    )
    return loss


def sampled_softmax(
    hidden_MD: Tensor,
    table_ID: Tensor | Rows,
    bias_I: Tensor | Rows,
    targets_M: Tensor,
    negatives: Negatives,
    weights_M: Tensor | None = None,
    *,
    seen: SeenItems | None = None,
) -> Tensor:
    """Cross-entropy over the target and N negatives, each of which stands for as many items as it
    was less likely than surely to be drawn (logQ correction; Jean et al., 2015, Yi et al., 2019).

    A negative that equals the target, or that its position sees, is masked.
    """
    if len(targets_M) == 0:
        return _nothing(hidden_MD, table_ID, bias_I)
    positive_M, negative_MN = _score(hidden_MD, table_ID, bias_I, targets_M, negatives)
    log_expected_MN = negatives.per_position(negatives.log_expected_GN, len(targets_M))
    negative_MN = (negative_MN - log_expected_MN).masked_fill(
        _is_void(negatives, targets_M, seen), float("-inf")
    )
    logits = torch.cat([positive_M[:, None], negative_MN], dim=1)
    first_M = torch.zeros_like(targets_M)
    if weights_M is None:
        return F.cross_entropy(logits, first_M)
    return _weighted_mean(F.cross_entropy(logits, first_M, reduction="none"), weights_M)


def binary_cross_entropy(
    hidden_MD: Tensor,
    table_ID: Tensor | Rows,
    bias_I: Tensor | Rows,
    targets_M: Tensor,
    negatives: Negatives,
    weights_M: Tensor | None = None,
    *,
    seen: SeenItems | None = None,
    calibration: float = 0.0,
    prior: bool = False,
) -> Tensor:
    """The target as a yes and N negatives as a no each; a mean over all `1 + N`.

    With a `calibration` t above 0 this is gBCE (Petrov & Macdonald, 2023,
    doi:10.1145/3604915.3608783): the probability of the target is raised to the power
    `beta = a * (t * (1 - 1/a) + 1/a)`, `a = N / (I - 1)` being the share of negatives that were
    drawn, so that sampling does not make the model overconfident. In closed form the target costs
    `beta * softplus(-s)`. A negative that equals the target, or that its position sees, costs
    nothing.

    With `prior` scores count as `s + log(beta / N)`, the one number that costs least where all
    scores are alike (Lin et al., 2017, arXiv:1708.02002, section 4.1); no ranking depends on it.
    """
    if len(targets_M) == 0:
        return _nothing(hidden_MD, table_ID, bias_I)
    positive_M, negative_MN = _score(hidden_MD, table_ID, bias_I, targets_M, negatives)
    share = min(1.0, negatives.num / max(1, len(table_ID) - NUM_SPECIAL - 1))
    beta = share * (calibration * (1 - 1 / share) + 1 / share)
    shift = math.log(beta / negatives.num) if prior else 0.0
    costs_MN = F.softplus(negative_MN + shift).masked_fill(
        _is_void(negatives, targets_M, seen), 0.0
    )
    costs_M = beta * F.softplus(-positive_M - shift) + costs_MN.sum(1)
    mean = costs_M.mean() if weights_M is None else _weighted_mean(costs_M, weights_M)
    return mean / (1 + negatives.num)


def compute_loss(
    config: LossConfig,
    hidden_MD: Tensor,
    table_ID: Tensor | Rows,
    bias_I: Tensor | Rows,
    targets_M: Tensor,
    negatives: Negatives | None,
    weights_M: Tensor | None = None,
    *,
    seen: SeenItems | None = None,
) -> Tensor:
    """The configured loss; `negatives` are None for the full softmax alone, and `seen` is there
    for a loss with `exclude_seen` alone.
    """
    if config.kind == "full-softmax":
        whole = hidden_MD, all_rows(table_ID), all_rows(bias_I), targets_M
        return full_softmax(*whole, weights_M, seen=seen, block_size=config.block_size)
    assert negatives is not None
    scored = hidden_MD, table_ID, bias_I, targets_M
    if config.kind == "sampled-softmax":
        return sampled_softmax(*scored, negatives, weights_M, seen=seen)
    calibration = config.calibration if config.kind == "gbce" else 0.0
    return binary_cross_entropy(
        *scored, negatives, weights_M, seen=seen, calibration=calibration, prior=config.prior
    )


def _score(
    hidden_MD: Tensor,
    table_ID: Tensor | Rows,
    bias_I: Tensor | Rows,
    targets_M: Tensor,
    negatives: Negatives,
) -> tuple[Tensor, Tensor]:
    """Scores of the targets `[M]` and of the negatives `[M, N]`, fp32."""
    dtype, (M, D), items_GN = hidden_MD.dtype, hidden_MD.shape, negatives.items_GN
    positive_M = (hidden_MD * table_ID[targets_M].to(dtype)).sum(1).float() + bias_I[targets_M]
    # Groups of equal size, the first and the last filled up: one product of matrices a group.
    G, P, before = len(items_GN), negatives.group_size, negatives.num_before
    filled_MD = F.pad(hidden_MD, (0, 0, before, G * P - M - before))
    negative_GPN = filled_MD.view(G, P, D) @ table_ID[items_GN].to(dtype).transpose(1, 2)
    negative_GPN = negative_GPN.float() + bias_I[items_GN][:, None]
    return positive_M, negative_GPN.flatten(0, 1)[before : before + M]


def _is_void(negatives: Negatives, targets_M: Tensor, seen: SeenItems | None) -> Tensor:
    """Which negatives are none, bool `[M, N]`."""
    is_target_MN = negatives.per_position(negatives.items_GN, len(targets_M)) == targets_M[:, None]
    return is_target_MN if seen is None else is_target_MN.logical_or_(seen.mark(negatives))


def _leave_out(logits_MI: Tensor, seen_ML: Tensor, wanted: tuple[Tensor, Tensor]) -> None:
    """Takes seen items out of the softmax, in place; not the targets, which stand at `wanted`."""
    targets_M = wanted[1]
    of_targets_M = logits_MI[wanted]
    # Padding and masks have no logit: where they stand the target's is taken out and put back.
    columns_ML = torch.where(seen_ML < NUM_SPECIAL, targets_M[:, None], seen_ML - NUM_SPECIAL)
    logits_MI.scatter_(1, columns_ML, float("-inf"))
    logits_MI[wanted] = of_targets_M


def block_bytes(is_cuda: bool, num_rows: int, element_bytes: int) -> int:
    """What the logits of a block of `full_softmax` take by default."""
    budget_bytes = 2**29 if is_cuda else 2**22
    return max(budget_bytes, _LEAST_POSITIONS * num_rows * element_bytes)


def _fitting_block(hidden_MD: Tensor, num_rows: int) -> int:
    element_bytes = hidden_MD.element_size()
    of_block = block_bytes(hidden_MD.is_cuda, num_rows, element_bytes)
    return of_block // (num_rows * element_bytes)


def _weighted_mean(costs_M: Tensor, weights_M: Tensor) -> Tensor:
    return (costs_M * weights_M).sum() / _total(weights_M)


def _total(weights_M: Tensor) -> Tensor:
    # Of no weight at all the sum would be 0; weights are above it.
    return weights_M.sum().clamp(min=torch.finfo(weights_M.dtype).tiny)


def _nothing(hidden_MD: Tensor, table_ID: Tensor | Rows, bias_I: Tensor | Rows) -> Tensor:
    """A zero that every parameter has a part in, so that ranks agree on who has a gradient."""
    padding = torch.tensor([PAD], device=hidden_MD.device)
    return 0.0 * (hidden_MD.sum() + table_ID[padding].sum() + bias_I[padding].sum()).float()

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from recsys.catalogue import MASK, PAD
from recsys.context import count_seconds
from recsys.splits import Split
from recsys.tokens import TokenStore


class ObjectiveConfig(BaseModel):
    """What the model learns to predict."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["masked-item", "next-item"] = "masked-item"
    mask_prob: float = Field(0.2, gt=0, lt=1)
    """masked-item: share of a window's positions that are hidden and scored."""
    last_prob: float = Field(0.2, ge=0, le=1)
    """masked-item: share of the windows in which the last position alone is hidden, as when
    recommending.
    """
    context_dropout: float = Field(0.1, ge=0, le=1)
    """Share of the windows whose scored positions know nothing of the request, so that a request
    may bring nothing.
    """


@dataclass(frozen=True)
class Batch:
    """Inputs of the model, and the M scored positions as flat indices into `[B * L]` with their
    targets.
    """

    items_BL: Tensor
    context_BLF: Tensor
    request_BLF: Tensor
    seconds_BL2: Tensor
    scored_M: Tensor
    targets_M: Tensor


class Windows:
    """Training windows of a token store: the flat tensors on a device and, an epoch, where each
    window lies.

    A long sequence gives `ceil(n / max_len)` windows. The last one always ends where training ends;
    the others are shifted by a random amount each epoch, so that windows are not cut at the same
    place twice.
    """

    def __init__(self, store: TokenStore, split: Split, max_len: int, device: torch.device) -> None:
        starts_U = store.offsets_U[:-1]
        lengths_U = split.train_end_U - starts_U
        num_windows_U = np.where(lengths_U >= 2, -(-lengths_U // max_len), 0)
        users = np.repeat(np.arange(store.num_users), num_windows_U)
        order = np.arange(len(users)) - np.repeat(
            np.cumsum(num_windows_U) - num_windows_U, num_windows_U
        )

        self.max_len = max_len
        self.device = device
        self.items_T = torch.from_numpy(store.items_T).to(device)
        self.context_TF = torch.from_numpy(store.context_TF).to(device)
        self.seconds_T = torch.from_numpy(count_seconds(store.timestamps_T)).to(device)
        self._floor = starts_U[users]
        self._end = split.train_end_U[users]
        self._back = order * max_len

    def __len__(self) -> int:
        return len(self._end)

    def batches(
        self, batch_size: int, seed: int, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Starts and lengths, int64 `[B]`, of each batch of this rank; every rank gets as many
        batches.

        All ranks draw the same permutation from `seed` and take their own part of each global
        batch. Batches hold windows of similar length, so that little padding is computed.
        """
        generator = np.random.default_rng(seed)
        shift = np.where(
            self._back > 0, generator.integers(0, max(self.max_len // 2, 1), len(self)), 0
        )
        end = np.maximum(self._end - self._back + shift, np.minimum(self._floor + 2, self._end))
        start = np.maximum(end - self.max_len, self._floor)

        for rows in _batch_rows(end - start, batch_size * world_size, generator):
            mine = rows[rank::world_size]
            yield (
                torch.from_numpy(start[mine]).to(self.device),
                torch.from_numpy((end - start)[mine]).to(self.device),
            )

    def num_batches(self, batch_size: int, world_size: int = 1) -> int:
        """Batches of an epoch, on every rank."""
        return max(1, -(-len(self) // (batch_size * world_size)))

    def gather(self, start_B: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Left-padded items `[B, L]` and context `[B, L, F]`, int64, and seconds `[B, L]`, int32; L
        the longest of the batch.
        """
        L = int(length_B.max())
        offset_BL = torch.arange(L, device=self.device) - (L - length_B[:, None])
        is_token_BL = offset_BL >= 0
        index_BL = (start_B[:, None] + offset_BL).clamp_(min=0)
        items_BL = self.items_T[index_BL].long().masked_fill_(~is_token_BL, PAD)
        context_BLF = self.context_TF[index_BL].long().masked_fill_(~is_token_BL[..., None], 0)
        seconds_BL = self.seconds_T[index_BL].masked_fill_(~is_token_BL, 0)
        return items_BL, context_BLF, seconds_BL


def make_batch(
    objective: ObjectiveConfig,
    items_BL: Tensor,
    context_BLF: Tensor,
    seconds_BL: Tensor,
    known_at_request_F: Tensor,
    generator: torch.Generator,
) -> Batch:
    """Chooses the scored positions of gathered windows, and hides from them what a request does not
    know.
    """
    forget_B11 = _draw(items_BL[:, :1], generator)[..., None] < objective.context_dropout
    if objective.kind == "masked-item":
        return _masked_item(
            objective, items_BL, context_BLF, seconds_BL, known_at_request_F, forget_B11, generator
        )
    return _next_item(items_BL, context_BLF, seconds_BL, known_at_request_F, forget_B11)


def _masked_item(
    objective: ObjectiveConfig,
    items_BL: Tensor,
    context_BLF: Tensor,
    seconds_BL: Tensor,
    known_at_request_F: Tensor,
    forget_B11: Tensor,
    generator: torch.Generator,
) -> Batch:
    is_token_BL = items_BL != PAD
    is_masked_BL = (_draw(items_BL, generator) < objective.mask_prob) & is_token_BL
    # Windows that drew no position score their last one, and so do those that imitate a
    # recommendation.
    last_only_B1 = _draw(items_BL[:, :1], generator) < objective.last_prob
    last_only_B1 |= ~is_masked_BL.any(1, keepdim=True)
    is_last_BL = torch.zeros_like(is_token_BL)
    is_last_BL[:, -1] = True
    is_masked_BL = torch.where(last_only_B1, is_last_BL, is_masked_BL)

    hidden_BLF = is_masked_BL[..., None] & (~known_at_request_F | forget_B11)
    scored_M = is_masked_BL.flatten().nonzero().squeeze(1)
    return Batch(
        items_BL=items_BL.masked_fill(is_masked_BL, MASK),
        context_BLF=context_BLF.masked_fill(hidden_BLF, 0),
        request_BLF=torch.zeros_like(context_BLF),
        seconds_BL2=_beside_nothing(seconds_BL.masked_fill(is_masked_BL & forget_B11[..., 0], 0)),
        scored_M=scored_M,
        targets_M=items_BL.flatten()[scored_M],
    )


def _next_item(
    items_BL: Tensor,
    context_BLF: Tensor,
    seconds_BL: Tensor,
    known_at_request_F: Tensor,
    forget_B11: Tensor,
) -> Batch:
    inputs_BL, targets_BL = items_BL[:, :-1], items_BL[:, 1:]
    scored_M = (inputs_BL != PAD).flatten().nonzero().squeeze(1)
    return Batch(
        items_BL=inputs_BL,
        context_BLF=context_BLF[:, :-1],
        request_BLF=context_BLF[:, 1:].masked_fill(~known_at_request_F | forget_B11, 0),
        seconds_BL2=torch.stack(
            [seconds_BL[:, :-1], seconds_BL[:, 1:].masked_fill(forget_B11[..., 0], 0)], dim=2
        ),
        scored_M=scored_M,
        targets_M=targets_BL.flatten()[scored_M],
    )


def _batch_rows(
    lengths: np.ndarray, size: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    # Within a pool of 32 batches windows are ordered by length; the batches are then visited at
    # random.
    rows = generator.permutation(len(lengths))
    # The last batch is filled from the front, so that every batch, on every rank, is whole.
    rows = np.resize(rows, -(-len(rows) // size) * size)
    pools = [rows[start : start + 32 * size] for start in range(0, len(rows), 32 * size)]
    batches = [batch for pool in pools for batch in _split_by_length(pool, lengths, size)]
    for index in generator.permutation(len(batches)):
        yield batches[index]


def _split_by_length(pool: np.ndarray, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    ordered = pool[np.argsort(lengths[pool], kind="stable")]
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _beside_nothing(seconds_BL: Tensor) -> Tensor:
    """Only a causal model reads when the request that follows a position came."""
    return torch.stack([seconds_BL, torch.zeros_like(seconds_BL)], dim=2)


def _draw(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device)

"""Training windows of a token store: where they lie in an epoch, and their events on a device."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recsys.catalogue import PAD
from recsys.context import count_seconds
from recsys.splits import Split, can_train
from recsys.tokens import TokenStore


class Places(NamedTuple):
    """Where the windows of a batch lie, int64 `[B]` each."""

    starts_B: Tensor
    lengths_B: Tensor
    rows_B: Tensor
    """Which of the global batch they are."""

    def split(self, num_parts: int) -> list["Places"]:
        """The same in so many consecutive parts."""
        parts = [column.tensor_split(num_parts) for column in self]
        return [Places(*columns) for columns in zip(*parts, strict=True)]


class Windows:
    """Training windows of a token store: the flat tensors on a device and, an epoch, where each
    window lies.

    A long sequence gives `ceil(n / max_len)` windows. The last one always ends where training ends;
    the others are shifted by a random amount each epoch, so that windows are not cut at the same
    place twice. Users without anything to learn from have none.
    """

    def __init__(
        self,
        store: TokenStore,
        split: Split,
        max_len: int,
        device: torch.device,
        is_target_T: np.ndarray | None = None,
    ) -> None:
        starts_U = store.offsets_U[:-1]
        lengths_U = split.train_end_U - starts_U
        is_used_U = can_train(store.offsets_U, split, is_target_T)
        num_windows_U = np.where(is_used_U, -(-lengths_U // max_len), 0)
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
        self, batch_size: int, seed: int, *, rank: int = 0, world_size: int = 1, first: int = 0
    ) -> Iterator[Places]:
        """This rank's part of each global batch of `batch_size` windows, from the batch `first` on;
        every rank gets as many.

        All ranks draw the same permutation from `seed`, and how many there are does not change what
        a global batch holds. Batches hold windows of similar length, so that little padding is
        computed.
        """
        generator = np.random.default_rng(seed)
        shift = np.where(
            self._back > 0, generator.integers(0, max(self.max_len // 2, 1), len(self)), 0
        )
        end = np.maximum(self._end - self._back + shift, np.minimum(self._floor + 2, self._end))
        start = np.maximum(end - self.max_len, self._floor)

        part = slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)
        places = np.arange(batch_size)[part]
        for rows in _batch_rows(end - start, batch_size, generator)[first:]:
            mine = rows[part]
            yield Places(
                torch.from_numpy(start[mine]).to(self.device),
                torch.from_numpy((end - start)[mine]).to(self.device),
                torch.from_numpy(places).to(self.device),
            )

    def num_batches(self, batch_size: int) -> int:
        """Global batches of an epoch."""
        return max(1, -(-len(self) // batch_size))

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


def _batch_rows(lengths: np.ndarray, size: int, generator: np.random.Generator) -> list[np.ndarray]:
    # Within a pool of 32 batches windows are ordered by length; the batches are then visited at
    # random.
    rows = generator.permutation(len(lengths))
    # The last batch is filled from the front, so that every batch is whole.
    rows = np.resize(rows, -(-len(rows) // size) * size)
    pools = [rows[start : start + 32 * size] for start in range(0, len(rows), 32 * size)]
    batches = [batch for pool in pools for batch in _split_by_length(pool, lengths, size)]
    return [batches[index] for index in generator.permutation(len(batches))]


def _split_by_length(pool: np.ndarray, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    ordered = pool[np.argsort(lengths[pool], kind="stable")]
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]

"""What the ranks of a training tell each other; alone, each answers itself."""

from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) where training is not distributed."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Each value summed, fp64."""
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return cast(list[float], sums.tolist())


def agree_on(learn: Callable[[], Tensor], empty: Tensor, device: torch.device) -> Tensor:
    """What the first rank learns, which the others receive; every rank calls it.

    Of `empty` shape and type are those of what is learned.
    """
    if not dist.is_initialized():
        return learn()
    agreed = (learn() if dist.get_rank() == 0 else empty).to(device)
    dist.broadcast(agreed, src=0)
    return agreed


def gather_rows(rows_RN: Tensor) -> Tensor:
    """The rows of all ranks, in the order of the ranks; every rank has as many."""
    if not dist.is_initialized():
        return rows_RN
    gathered = [torch.empty_like(rows_RN) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows_RN.contiguous())
    return torch.cat(gathered)


def gather_lists(values_M: Tensor, lengths: list[int]) -> Tensor:
    """The values `[M, ...]` of all ranks one after the other; of rank r there are `lengths[r]`."""
    if not dist.is_initialized():
        return values_M
    missing = [0, 0] * (values_M.ndim - 1) + [0, max(lengths) - len(values_M)]
    parts = gather_rows(F.pad(values_M, missing)[None])
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

"""In which numbers a model counts."""

import functools
import time

import torch
from torch import Tensor

from recsys.ranks import sum_over_ranks


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bf16 when asked for, or when `auto` finds a device that gains by it: a GPU that multiplies it
    natively, a CPU that multiplies it faster than fp32.
    """
    if precision == "auto":
        is_faster = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else _multiplies_bf16_faster()
        )
        precision = "bf16" if is_faster else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def agree_on_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bf16 where every rank chooses it: their machines may differ. Every rank calls it."""
    dtype = choose_dtype(precision, device)
    (num_others,) = sum_over_ranks([float(dtype != torch.bfloat16)], device)
    return torch.float32 if num_others else torch.bfloat16


@functools.cache
def _multiplies_bf16_faster() -> bool:
    """Whether this CPU has instructions for bf16 and gains by them. Some that have them multiply
    fp32 twice as fast: nothing but the clock tells.
    """
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    fp32 = torch.ones(512, 64), torch.ones(64, 4096)
    seconds_fp32 = time_product(*fp32)
    return time_product(*(matrix.bfloat16() for matrix in fp32)) <= seconds_fp32


def time_product(left: Tensor, right: Tensor) -> float:
    """Seconds of a product of two matrices, the fastest of ten."""
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    return min(seconds)

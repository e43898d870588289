"""The compiled loops of `recsys.scan`: they score a range of items and keep the best in heaps. They
run without Python's lock, so that threads share out the ranges.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeVar, cast

import numpy as np
import torch
from numba import njit

_CHUNK = 2048
"""Codes of so many items stay in the first cache for the next request."""
_HALF_SCALE = np.float32(2.0**112)
"""Moves the exponent of fp16 to where fp32 has it."""

Scan = Callable[..., None]
"""Called with the table, the states, `shift_I` and `scale_I` (None for none), rules, lists, and the
first item and the one behind the last."""
_Function = TypeVar("_Function", bound=Callable[..., object])


def _compiled(function: _Function) -> _Function:
    return cast(_Function, njit(nogil=True)(function))


class Rules(NamedTuple):
    """What the lists of B requests may hold, as the loops read it."""

    ks_B: np.ndarray
    """int64."""
    masks_SI: np.ndarray
    """bool, the different masks: whose attributes do not pass."""
    mask_B: np.ndarray
    """int64, row of `masks_SI`; -1 where all pass."""
    hidden: np.ndarray
    """int64, items that are left out, request after request, ascending in each."""
    ends_B: np.ndarray
    """int64 `[B + 1]`: those of request b are `hidden[ends_B[b]:ends_B[b + 1]]`."""


class Lists(NamedTuple):
    """Heaps, the worst at the root."""

    items_BK: np.ndarray
    scores_BK: np.ndarray
    sizes_B: np.ndarray
    least_B: np.ndarray
    """fp32, what a score must exceed; of items with this score the lower ones are in already."""
    broken_B: np.ndarray
    """int64, an item whose score is not a number; -1 where there is none."""


@lru_cache
def compile_codes(num_codes: int, num_values: int) -> Scan:
    """The loop over codes; their number is a constant that the compiler unrolls."""

    @_compiled
    def scan_codes(
        codes: np.ndarray,
        products_BP: np.ndarray,
        shift_I: np.ndarray | None,
        scale_I: np.ndarray | None,
        rules: Rules,
        lists: Lists,
        start: int,
        stop: int,
    ) -> None:
        for first in range(start, stop, _CHUNK):
            for b in range(len(products_BP)):
                products, least = products_BP[b], lists.least_B[b]
                for item in range(first, min(first + _CHUNK, stop)):
                    score = np.float32(0)
                    for c in range(num_codes):
                        score += products[c * num_values + codes[item, c]]
                    if scale_I is not None:
                        score *= scale_I[item]
                    if shift_I is not None:
                        score += shift_I[item]
                    # True for what is not a number as well.
                    if not score <= least:
                        least = _offer(rules, lists, b, item, score)

    return scan_codes


@lru_cache
def compile_vectors(dtype: torch.dtype) -> Scan:
    """The loop over vectors; halves come as uint16."""
    unpack = {
        torch.float32: _take_row,
        torch.float16: _unpack_fp16,
        torch.bfloat16: _unpack_bf16,
    }[dtype]

    def scan_vectors(
        vectors: np.ndarray,
        states_BD: np.ndarray,
        shift_I: np.ndarray | None,
        scale_I: np.ndarray | None,
        rules: Rules,
        lists: Lists,
        start: int,
        stop: int,
    ) -> None:
        bits_D = np.empty(states_BD.shape[1], np.uint32)
        for item in range(start, stop):
            vector_D = unpack(vectors[item], bits_D)
            for b in range(len(states_BD)):
                state_D = states_BD[b]
                score = np.float32(0)
                for d in range(len(state_D)):
                    score += vector_D[d] * state_D[d]
                if scale_I is not None:
                    score *= scale_I[item]
                if shift_I is not None:
                    score += shift_I[item]
                if not score <= lists.least_B[b]:
                    _offer(rules, lists, b, item, score)

    # Sums may be made in the order of the vector units.
    return cast(Scan, njit(nogil=True, fastmath={"reassoc", "contract"})(scan_vectors))


@_compiled
def _take_row(row_D: np.ndarray, bits_D: np.ndarray) -> np.ndarray:
    return row_D


@_compiled
def _unpack_bf16(row_D: np.ndarray, bits_D: np.ndarray) -> np.ndarray:
    for d in range(len(row_D)):
        bits_D[d] = np.uint32(row_D[d]) << np.uint32(16)
    return bits_D.view(np.float32)


@_compiled
def _unpack_fp16(row_D: np.ndarray, bits_D: np.ndarray) -> np.ndarray:
    values_D = bits_D.view(np.float32)
    for d in range(len(row_D)):
        half = np.uint32(row_D[d])
        sign = (half & np.uint32(0x8000)) << np.uint32(16)
        bits_D[d] = sign | ((half & np.uint32(0x7FFF)) << np.uint32(13))
    for d in range(len(row_D)):
        values_D[d] *= _HALF_SCALE
    return values_D


@_compiled
def _offer(rules: Rules, lists: Lists, b: int, item: int, score: np.float32) -> np.float32:
    """Puts an item on list b if it may be there; what the next one must exceed."""
    least: np.float32 = lists.least_B[b]
    if _is_hidden(rules, b, item):
        return least
    if np.isnan(score):
        lists.broken_B[b] = item
        return least
    k, size = rules.ks_B[b], lists.sizes_B[b]
    items_K, scores_K = lists.items_BK[b], lists.scores_BK[b]
    if size < k:
        _push(items_K, scores_K, size, item, score)
        size += 1
        lists.sizes_B[b] = size
    else:
        _replace_root(items_K, scores_K, size, item, score)
    if size == k:
        least = scores_K[0]
        lists.least_B[b] = least
    return least


@_compiled
def _is_hidden(rules: Rules, b: int, item: int) -> bool:
    mask = rules.mask_B[b]
    if mask >= 0 and rules.masks_SI[mask, item]:
        return True
    low, end = rules.ends_B[b], rules.ends_B[b + 1]
    high = end
    while low < high:
        middle = (low + high) // 2
        if rules.hidden[middle] < item:
            low = middle + 1
        else:
            high = middle
    return bool(low < end and rules.hidden[low] == item)


@_compiled
def _is_worse(score: np.float32, item: int, other_score: np.float32, other_item: int) -> bool:
    return bool(score < other_score or (score == other_score and item > other_item))


@_compiled
def _push(
    items_K: np.ndarray, scores_K: np.ndarray, size: int, item: int, score: np.float32
) -> None:
    """Adds an item to a heap of `size`."""
    place = size
    while place > 0:
        parent = (place - 1) // 2
        if not _is_worse(score, item, scores_K[parent], items_K[parent]):
            break
        scores_K[place], items_K[place] = scores_K[parent], items_K[parent]
        place = parent
    scores_K[place], items_K[place] = score, item


@_compiled
def _replace_root(
    items_K: np.ndarray, scores_K: np.ndarray, size: int, item: int, score: np.float32
) -> None:
    """Puts an item in the place of the worst of a heap."""
    place = 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and _is_worse(
            scores_K[child + 1], items_K[child + 1], scores_K[child], items_K[child]
        ):
            child += 1
        if not _is_worse(scores_K[child], items_K[child], score, item):
            break
        scores_K[place], items_K[place] = scores_K[child], items_K[child]
        place = child
    scores_K[place], items_K[place] = score, item

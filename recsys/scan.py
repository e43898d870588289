"""Exact retrieval on a CPU: compiled loops score an item and offer it to every list at once, so that
no score is stored, and items that are left out cost nothing but a look where they would have won.

Items are cut into ranges that threads scan at the same time, each with lists of its own; what
comes out does not depend on how many there are.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from recsys.catalogue import NUM_SPECIAL
from recsys.item_table import CodedTable
from recsys.model import NextItemModel
from recsys.retrieval import Best, Wish, cut, inverse_norms

_RANGES_PER_THREAD = 4
"""A thread that is held up leaves its last range to another."""
_LEAST_RANGE = 2**15
_CHUNK = 2048
"""Codes of so many items stay in the first cache for the next request."""
_LARGEST_HALF = np.float32(2.0**112)
"""Moves the exponent of fp16 to where fp32 has it."""


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


class ScanRetriever:
    """`recsys.retrieval.Retriever` for a materialised model on the CPU."""

    def __init__(self, model: NextItemModel, num_threads: int) -> None:
        self._table = model.output_table
        self._score = _scorer(self._table)
        self._bias_I = model.output_bias_I.detach().contiguous().numpy()
        self._inverse_norms_I = inverse_norms(model)
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="scan")

    def by_product(self, states_BD: Tensor, wishes: Sequence[Wish]) -> list[Best]:
        """See `Retriever`."""
        return self._search(states_BD, wishes, self._bias_I, None)

    def by_cosine(self, items_B: Tensor, wishes: Sequence[Wish]) -> list[Best]:
        """See `Retriever`."""
        states_BD = self._table(items_B) * self._inverse_norms_I[items_B, None]
        return self._search(states_BD, wishes, None, self._inverse_norms_I.numpy())

    @torch.no_grad()
    def _search(
        self,
        states_BD: Tensor,
        wishes: Sequence[Wish],
        shift_I: np.ndarray | None,
        scale_I: np.ndarray | None,
    ) -> list[Best]:
        num_rows = len(self._bias_I)
        rules = _write_rules(wishes, num_rows)
        scan = partial(self._score(states_BD.detach()), shift_I, scale_I, rules)
        ranges = self._cut(num_rows)
        found = [_empty_lists(rules) for _ in ranges]
        if len(ranges) == 1:
            scan(found[0], *ranges[0])
        else:
            list(self._threads.map(scan, found, *zip(*ranges, strict=True)))
        return [_merge(found, row, wish.k) for row, wish in enumerate(wishes)]

    def _cut(self, num_rows: int) -> list[tuple[int, int]]:
        most = self._num_threads * _RANGES_PER_THREAD if self._num_threads > 1 else 1
        count = max(1, min(most, num_rows // _LEAST_RANGE))
        ends = np.linspace(NUM_SPECIAL, num_rows, count + 1).astype(int).tolist()
        return list(zip(ends[:-1], ends[1:], strict=True))


def _write_rules(wishes: Sequence[Wish], num_rows: int) -> Rules:
    masks = {id(wish.blocked_I): wish.blocked_I for wish in wishes if wish.blocked_I is not None}
    rows = {key: row for row, key in enumerate(masks)}
    arrays = [mask.numpy() for mask in masks.values()]
    hidden = [np.sort(wish.hidden) for wish in wishes]
    return Rules(
        np.array([min(wish.k, num_rows) for wish in wishes], np.int64),
        # Nearly always there is one, which is not copied.
        arrays[0][None] if len(arrays) == 1 else np.array(arrays, bool).reshape(-1, num_rows),
        np.array([rows.get(id(wish.blocked_I), -1) for wish in wishes], np.int64),
        np.concatenate(hidden).astype(np.int64),
        np.cumsum([0, *(len(items) for items in hidden)]),
    )


def _empty_lists(rules: Rules) -> Lists:
    B, K = len(rules.ks_B), max(1, int(rules.ks_B.max()))
    least_B = np.where(rules.ks_B > 0, -np.inf, np.inf).astype(np.float32)
    return Lists(
        np.empty((B, K), np.int64),
        np.empty((B, K), np.float32),
        np.zeros(B, np.int64),
        least_B,
        np.full(B, -1),
    )


def _merge(found: Sequence[Lists], row: int, k: int) -> Best:
    """The best of what the ranges found for one request."""
    for lists in found:
        if lists.broken_B[row] >= 0:
            return Best(lists.broken_B[row : row + 1], np.full(1, np.nan, np.float32))
    items = np.concatenate([lists.items_BK[row, : lists.sizes_B[row]] for lists in found])
    scores = np.concatenate([lists.scores_BK[row, : lists.sizes_B[row]] for lists in found])
    order = np.lexsort((items, -scores))[:k]
    return cut(items[order], scores[order], k)


Scan = Callable[..., None]
"""Called with shift_I, scale_I, rules, lists, start and stop."""


def _scorer(table: Any) -> Callable[[Tensor], Scan]:
    """From states to the loop that scans a range of the table with them."""
    if isinstance(table, CodedTable):
        codes = table.codes.contiguous().numpy()
        C, V, _ = table.centroids.shape
        scan_codes = _compile_codes(C, V)
        return lambda states_BD: partial(
            scan_codes, codes, table.centroid_products(states_BD).flatten(1).contiguous().numpy()
        )
    weight_ID = table.weight.detach().contiguous()
    scan_vectors = _compile_vectors(weight_ID.dtype)
    is_whole = weight_ID.dtype == torch.float32
    vectors = (weight_ID if is_whole else weight_ID.view(torch.uint16)).numpy()
    return lambda states_BD: partial(scan_vectors, vectors, states_BD.float().contiguous().numpy())


@lru_cache
def _compile_codes(num_codes: int, num_values: int) -> Scan:
    """The loop over codes; their number is a constant that the compiler unrolls."""

    @njit(nogil=True)
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
def _compile_vectors(dtype: torch.dtype) -> Scan:
    """The loop over vectors; halves come as uint16."""
    unpack = {
        torch.float32: _take_row,
        torch.float16: _unpack_fp16,
        torch.bfloat16: _unpack_bf16,
    }[dtype]

    # Sums may be made in the order of the vector units.
    @njit(nogil=True, fastmath={"reassoc", "contract"})
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

    return scan_vectors


@njit(nogil=True)
def _take_row(row_D: np.ndarray, bits_D: np.ndarray) -> np.ndarray:
    return row_D


@njit(nogil=True)
def _unpack_bf16(row_D: np.ndarray, bits_D: np.ndarray) -> np.ndarray:
    for d in range(len(row_D)):
        bits_D[d] = np.uint32(row_D[d]) << np.uint32(16)
    return bits_D.view(np.float32)


@njit(nogil=True)
def _unpack_fp16(row_D: np.ndarray, bits_D: np.ndarray) -> np.ndarray:
    values_D = bits_D.view(np.float32)
    for d in range(len(row_D)):
        half = np.uint32(row_D[d])
        sign = (half & np.uint32(0x8000)) << np.uint32(16)
        bits_D[d] = sign | ((half & np.uint32(0x7FFF)) << np.uint32(13))
    for d in range(len(row_D)):
        values_D[d] *= _LARGEST_HALF
    return values_D


@njit(nogil=True)
def _offer(rules: Rules, lists: Lists, b: int, item: int, score: float) -> float:
    """Puts an item on list b if it may be there; what the next one must exceed."""
    k, size = rules.ks_B[b], lists.sizes_B[b]
    if _is_hidden(rules, b, item):
        return lists.least_B[b]
    if np.isnan(score):
        lists.broken_B[b] = item
        return lists.least_B[b]
    items_K, scores_K = lists.items_BK[b], lists.scores_BK[b]
    if size < k:
        _push(items_K, scores_K, size, item, score)
        size += 1
        lists.sizes_B[b] = size
    else:
        _replace_root(items_K, scores_K, size, item, score)
    if size == k:
        lists.least_B[b] = scores_K[0]
    return lists.least_B[b]


@njit(nogil=True)
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
    return low < end and rules.hidden[low] == item


@njit(nogil=True)
def _is_worse(score: float, item: int, other_score: float, other_item: int) -> bool:
    return score < other_score or (score == other_score and item > other_item)


@njit(nogil=True)
def _push(
    items_K: np.ndarray, scores_K: np.ndarray, size: int, item: int, score: float
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


@njit(nogil=True)
def _replace_root(
    items_K: np.ndarray, scores_K: np.ndarray, size: int, item: int, score: float
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

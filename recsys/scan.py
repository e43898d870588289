"""Exact retrieval on a CPU: compiled loops score an item and offer it to a list at once, so that no
score is stored, and items that are left out cost nothing but a look where they would have won.

Items are cut into ranges that threads scan at the same time, each with lists of its own; what
comes out does not depend on how many there are.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys.catalogue import NUM_SPECIAL
from recsys.item_table import CodedTable
from recsys.model import NextItemModel
from recsys.retrieval import Best, Wish, cut, inverse_norms
from recsys.scan_loops import Lists, Rules, Scan, compile_codes, compile_vectors

_RANGES_PER_THREAD = 4
"""A thread that is held up leaves its last range to another."""
_LEAST_RANGE = 2**15


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
        return list(pairwise(ends))


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


def _scorer(table: Any) -> Callable[[Tensor], Scan]:
    """From states to the loop that scans a range of the table with them."""
    if isinstance(table, CodedTable):
        codes = table.codes.contiguous().numpy()
        C, V, _ = table.centroids.shape
        scan_codes = compile_codes(C, V)
        return lambda states_BD: partial(
            scan_codes, codes, table.centroid_products(states_BD).flatten(1).contiguous().numpy()
        )
    weight_ID = table.weight.detach().contiguous()
    scan_vectors = compile_vectors(weight_ID.dtype)
    is_whole = weight_ID.dtype == torch.float32
    vectors = (weight_ID if is_whole else weight_ID.view(torch.uint16)).numpy()
    return lambda states_BD: partial(scan_vectors, vectors, states_BD.float().contiguous().numpy())

"""Exact retrieval: the items with the largest scores of a whole catalogue, what a list may not hold
left out before the selection, in memory that does not grow with requests times items.

Of equal scores the item with the lower index comes first, on every path: by compiled loops on a CPU
(`recsys.scan`), and block by block with torch elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from recsys.catalogue import NUM_SPECIAL
from recsys.item_table import ItemTable, RoundedTable
from recsys.model import NextItemModel

TableType = Literal["fp32", "fp16", "bf16"]
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_MAX_SCORES = 2**26
"""Scores that exist at the same time: 256 MiB in fp32."""
_LEAST_ROWS = 2**14
_CHUNK = 128
_LOW_BITS = 2**32 - 1


@dataclass(frozen=True)
class Wish:
    """What one list may hold."""

    k: int
    hidden: np.ndarray
    """int64, items that are left out, in any order."""
    blocked_I: Tensor | None = None
    """Whose attributes do not pass, bool, on the device of the retriever; None: all pass."""


class Best(NamedTuple):
    """Best first, fewer than `k` where no more have a score above minus infinity. A score that is
    not a number stands first.
    """

    items: np.ndarray
    """int64."""
    scores: np.ndarray
    """fp32."""


class Retriever(Protocol):
    """Finds the best of all items for several requests at once; a wish a request."""

    def by_product(self, states_BD: Tensor, wishes: Sequence[Wish]) -> list[Best]:
        """By the product with the states, and the item's bias."""
        ...

    def by_cosine(self, items_B: Tensor, wishes: Sequence[Wish]) -> list[Best]:
        """By the cosine with the vector of an item."""
        ...


def round_tables(model: NextItemModel, kind: TableType) -> None:
    """Keeps the item vectors of a materialised model in half the memory, from here on and for good.

    The values are rounded once, to 11 bits (fp16) or 8 (bf16); every sum is still made in fp32, so
    that the lists are exact for the rounded vectors. Tables made of codes stay as they are: their
    centroids take next to nothing.

    Raises: ValueError when a value is beyond the range of fp16.
    """
    if kind == "fp32":
        return
    if type(model.items) is ItemTable:
        model.items = RoundedTable(model.items.weight, _DTYPES[kind])
    if type(model.outputs) is ItemTable:
        model.outputs = RoundedTable(model.outputs.weight, _DTYPES[kind])


def make_retriever(model: NextItemModel, num_threads: int) -> Retriever:
    """The retriever for the device of a materialised model.

    Args:
        num_threads: cores that a search on a CPU shares out its items among.
    """
    if model.item_bias.device.type != "cpu":
        return BlockRetriever(model)
    # The compiler takes half a second and 60 MB, which only those who search on a CPU shall pay.
    from recsys.scan import ScanRetriever

    return ScanRetriever(model, num_threads)


class BlockRetriever:
    """With torch, on any device: scores of a block of items, and the best so far."""

    def __init__(self, model: NextItemModel, *, max_scores: int = _MAX_SCORES) -> None:
        self._table = model.output_table
        self._bias_I = model.output_bias_I.detach()
        self._inverse_norms_I = inverse_norms(model)
        self._max_scores = max_scores

    def by_product(self, states_BD: Tensor, wishes: Sequence[Wish]) -> list[Best]:
        """See `Retriever`."""
        return self._search(states_BD, wishes, is_cosine=False)

    def by_cosine(self, items_B: Tensor, wishes: Sequence[Wish]) -> list[Best]:
        """See `Retriever`."""
        states_BD = self._table(items_B) * self._inverse_norms_I[items_B, None]
        return self._search(states_BD, wishes, is_cosine=True)

    @torch.no_grad()
    def _search(self, states_BD: Tensor, wishes: Sequence[Wish], *, is_cosine: bool) -> list[Best]:
        num_rows = len(self._bias_I)
        k = min(max(wish.k for wish in wishes), num_rows)
        best_BK = torch.empty(len(wishes), 0, dtype=torch.int64, device=states_BD.device)
        step = max(_LEAST_ROWS, self._max_scores // len(wishes))
        for start in range(NUM_SPECIAL, num_rows, step):
            block = slice(start, min(start + step, num_rows))
            scores_BN = self._table.products(states_BD, block).float()
            scores_BN = (
                scores_BN * self._inverse_norms_I[block]
                if is_cosine
                else scores_BN + self._bias_I[block]
            )
            _hide(scores_BN, wishes, block)
            both_BK = torch.cat([best_BK, _top_keys(scores_BN, start, k)], dim=1)
            best_BK = both_BK.topk(min(k, both_BK.shape[1])).values
        scores_BK, items_BK = (tensor.cpu().numpy() for tensor in _read_keys(best_BK))
        return [
            cut(items_K, scores_K, wish.k)
            for items_K, scores_K, wish in zip(items_BK, scores_BK, wishes, strict=True)
        ]


@torch.no_grad()
def inverse_norms(model: NextItemModel) -> Tensor:
    """One over the length of every item's vector, `[I]`, in blocks: a table may exist as codes."""
    items_I = torch.arange(len(model.item_bias), device=model.item_bias.device)
    norms = [model.output_table(items).norm(dim=1) for items in torch.split(items_I, 2**16)]
    return 1 / torch.cat(norms).clamp(min=1e-12)


def cut(items_K: np.ndarray, scores_K: np.ndarray, k: int) -> Best:
    """The first `k` of sorted items, without those at minus infinity."""
    count = int((scores_K[:k] != -np.inf).sum())
    return Best(items_K[:count], scores_K[:count])


def _hide(scores_BN: Tensor, wishes: Sequence[Wish], block: slice) -> None:
    """Minus infinity for what a list may not hold."""
    for scores_N, wish in zip(scores_BN, wishes, strict=True):
        if wish.blocked_I is not None:
            scores_N.masked_fill_(wish.blocked_I[block], float("-inf"))
    rows = np.repeat(np.arange(len(wishes)), [len(wish.hidden) for wish in wishes])
    items = np.concatenate([wish.hidden for wish in wishes]).astype(np.int64)
    is_here = (items >= block.start) & (items < block.stop)
    scores_BN[torch.from_numpy(rows[is_here]), torch.from_numpy(items[is_here] - block.start)] = (
        float("-inf")
    )


def _top_keys(scores_BN: Tensor, first: int, k: int) -> Tensor:
    """Keys of the `k` best of each row; column 0 is the item `first`.

    They lie in the `k` chunks of columns with the best maxima, so that a wide row is read once and
    sorted hardly at all.
    """
    num_queries, num_items = scores_BN.shape
    num_chunks = num_items // _CHUNK
    places_N = torch.arange(num_items, device=scores_BN.device)
    if num_chunks <= k:
        return _make_keys(scores_BN, places_N + first).topk(min(k, num_items)).values
    whole = num_chunks * _CHUNK
    maxima_BC = scores_BN[:, :whole].reshape(num_queries, num_chunks, _CHUNK).amax(2)
    chunks_BK = _read_keys(_make_keys(maxima_BC, places_N[:num_chunks]).topk(k).values)[1]
    within_BN = (chunks_BK[..., None] * _CHUNK + places_N[:_CHUNK]).flatten(1)
    columns_BN = torch.cat([within_BN, places_N[whole:].expand(num_queries, -1)], dim=1)
    keys_BN = _make_keys(scores_BN.gather(1, columns_BN), columns_BN + first)
    return keys_BN.topk(k).values


def _make_keys(scores: Tensor, items: Tensor) -> Tensor:
    """Numbers in the order of the scores, and of equal scores the lower item first, int64."""
    # Minus zero is no less than zero, and what is not a number, of either sign, is the largest.
    scores = torch.where(scores.isnan(), float("nan"), scores + 0.0)
    bits = scores.contiguous().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) | (_LOW_BITS - items)


def _read_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and items of keys."""
    ordered = (keys >> 32).int()
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.view(torch.float32), _LOW_BITS - (keys & _LOW_BITS)

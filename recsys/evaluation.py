"""Full-catalogue ranking: where each user's target stands among all items, for a model and for
every baseline alike.

Ties count against us: an item with the target's own score ranks before it.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from recsys.catalogue import NUM_SPECIAL, PAD
from recsys.errors import ScoreError
from recsys.tokens import TokenStore

_SCORES_PER_BLOCK = 2**27
_LARGEST_BLOCK = 512
_CELLS_PER_STEP = 2**22
_CHUNK = 128


class Scorer(Protocol):
    """Anything that scores the catalogue for a user who stands before a target."""

    name: str

    def score(self, store: TokenStore, users_B: np.ndarray, targets_B: np.ndarray) -> Tensor:
        """Scores fp32 `[B, I]`, padding and mask -inf; the caller may write into them.

        The history of a user is `store.offsets_U[user]:target`; of the target itself nothing may be
        read but the context of the request, and that only by a scorer whose name says so.
        """
        ...


@dataclass(frozen=True)
class Ranking:
    """Where N targets stand, and what stands first."""

    ranks_N: np.ndarray
    """int64, from 1; the number of rows of the catalogue where the target cannot be
    recommended.
    """
    top_NK: np.ndarray
    """int32 items, best first; PAD where nothing more can be recommended."""


def rank_targets(
    scorer: Scorer,
    store: TokenStore,
    users_N: np.ndarray,
    targets_N: np.ndarray,
    *,
    filter_seen: bool = True,
    top_k: int = 20,
    batch_size: int | None = None,
) -> Ranking:
    """Ranks the item at each target position among the whole catalogue.

    With `filter_seen` items of the user's history cannot be recommended; a target that the user has
    seen before then ranks last, behind every item.

    Args:
        batch_size: users that are scored at once; as many by default as have 512 MiB of scores, and
            512 at most. A scorer may hold twice as much while it makes them.

    Raises: ValueError without a target; ScoreError when a score is not a number.
    """
    if len(users_N) == 0:
        raise ValueError("There is no target to rank; check the split.")
    ranks, tops = [], []
    # Nobody knows how wide the scores are before the first user has them.
    start, stop = 0, batch_size or 1
    while start < len(users_N):
        users_B, targets_B = users_N[start:stop], targets_N[start:stop]
        scores_BI = scorer.score(store, users_B, targets_B)
        if filter_seen:
            rows, items = seen_items(store, users_B, targets_B)
            scores_BI[rows.to(scores_BI.device), items.to(scores_BI.device)] = float("-inf")

        best_BK, items_BK = top_scores(scores_BI, min(top_k, scores_BI.shape[1] - NUM_SPECIAL))
        # What is not a number counts as the largest, so it would stand first.
        if torch.isnan(best_BK).any():
            raise ScoreError(f"{scorer.name} gave a score that is not a number.")
        tops.append(items_BK.masked_fill(best_BK == float("-inf"), PAD).int().cpu().numpy())
        wanted_B = torch.from_numpy(store.items_T[targets_B]).long().to(scores_BI.device)
        ranks.append(_count_at_least(scores_BI, scores_BI.gather(1, wanted_B[:, None])))
        start, stop = stop, stop + (batch_size or block_size(scores_BI.shape[1]))
        # Released before the next block is scored, or two would be held.
        del scores_BI
    return Ranking(np.concatenate(ranks), np.concatenate(tops))


def block_size(num_rows: int) -> int:
    """Users whose scores over `num_rows` fill 512 MiB; 512 at most."""
    return max(1, min(_LARGEST_BLOCK, _SCORES_PER_BLOCK // num_rows))


def top_scores(scores_BI: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest scores of each row, largest first, and their columns: both `[B, K]`.

    They lie in the `k` chunks of columns with the largest maxima, so that a wide row is read once
    and sorted hardly at all.
    """
    num_users, num_rows = scores_BI.shape
    num_chunks = num_rows // _CHUNK
    if num_chunks <= k:
        best = scores_BI.topk(k)
        return best.values, best.indices
    whole = num_chunks * _CHUNK
    maxima_BC = scores_BI[:, :whole].reshape(num_users, num_chunks, _CHUNK).amax(2)
    firsts_BK = maxima_BC.topk(k).indices * _CHUNK
    within = torch.arange(_CHUNK, device=scores_BI.device)
    rest = torch.arange(whole, num_rows, device=scores_BI.device).expand(num_users, -1)
    columns_BC = torch.cat([(firsts_BK[..., None] + within).flatten(1), rest], dim=1)
    best = scores_BI.gather(1, columns_BC).topk(k)
    return best.values, columns_BC.gather(1, best.indices)


def _count_at_least(scores_BI: Tensor, least_B1: Tensor) -> np.ndarray:
    """Scores of each row that are not below its own bound, int64 `[B]`."""
    # In parts that fit a cache, instead of one more matrix of the size of the scores.
    rows = max(1, _CELLS_PER_STEP // scores_BI.shape[1])
    counts = [
        (scores >= least).sum(1, dtype=torch.int32)
        for scores, least in zip(
            torch.split(scores_BI, rows), torch.split(least_B1, rows), strict=True
        )
    ]
    return torch.cat(counts).long().cpu().numpy()


def seen_items(
    store: TokenStore, users_B: np.ndarray, targets_B: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Every event before the targets, as (row in the batch, item), both int64 and flat."""
    starts_B = store.offsets_U[users_B]
    lengths_B = targets_B - starts_B
    rows = np.repeat(np.arange(len(users_B)), lengths_B)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(lengths_B) - lengths_B, lengths_B)
    items = store.items_T[np.repeat(starts_B, lengths_B) + within]
    return torch.from_numpy(rows), torch.from_numpy(items.astype(np.int64))

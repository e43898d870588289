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
from recsys.tokens import TokenStore


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
    batch_size: int = 512,
) -> Ranking:
    """Ranks the item at each target position among the whole catalogue.

    With `filter_seen` items of the user's history cannot be recommended; a target that the user has
    seen before then ranks last, behind every item.

    Raises: ValueError without a target, or when a score is not a number.
    """
    if len(users_N) == 0:
        raise ValueError("There is no target to rank; check the split.")
    ranks, tops = [], []
    for start in range(0, len(users_N), batch_size):
        users_B, targets_B = (
            users_N[start : start + batch_size],
            targets_N[start : start + batch_size],
        )
        scores_BI = scorer.score(store, users_B, targets_B)
        if filter_seen:
            rows, items = seen_items(store, users_B, targets_B)
            scores_BI[rows.to(scores_BI.device), items.to(scores_BI.device)] = float("-inf")

        wanted_B = torch.from_numpy(store.items_T[targets_B]).long().to(scores_BI.device)
        target_B1 = scores_BI.gather(1, wanted_B[:, None])
        if torch.isnan(scores_BI).any():
            raise ValueError(f"{scorer.name} gave a score that is not a number.")
        ranks.append((scores_BI >= target_B1).sum(1).cpu().numpy())
        best = scores_BI.topk(min(top_k, scores_BI.shape[1] - NUM_SPECIAL))
        top_BK = best.indices.masked_fill(best.values == float("-inf"), PAD)
        tops.append(top_BK.int().cpu().numpy())
    return Ranking(np.concatenate(ranks), np.concatenate(tops))


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

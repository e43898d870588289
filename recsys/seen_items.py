"""Which items the scored positions of a batch see, for losses that leave those out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.catalogue import NUM_SPECIAL, PAD
from recsys.negatives import Negatives

_NEVER = torch.iinfo(torch.int32).max
"""The place of an item that stands nowhere in a window."""


@dataclass(frozen=True)
class SeenItems:
    """The windows of a batch, and how far each of M scored positions sees in them."""

    items_BL: Tensor
    """int64; padding and masks are no items."""
    windows_M: Tensor
    """Of each scored position, ascending."""
    last_places_M: Tensor
    """The last place of its window that a position sees."""

    @classmethod
    def of(cls, items_BL: Tensor, scored_M: Tensor, *, is_causal: bool) -> "SeenItems":
        """What the positions `scored_M`, flat indices into `[B * L]`, see: a causal one its own
        place and those before it, any other the whole window.
        """
        L = items_BL.shape[1]
        last_places_M = scored_M % L if is_causal else torch.full_like(scored_M, L - 1)
        return cls(items_BL, scored_M // L, last_places_M)

    def of_positions(self, positions: slice) -> Tensor:
        """The items that some of the scored positions see, int64 `[M, L]`; PAD or MASK where there
        is none.
        """
        seen_ML = self.items_BL[self.windows_M[positions]]
        places_L = torch.arange(seen_ML.shape[1], device=seen_ML.device)
        return seen_ML.masked_fill_(places_L > self.last_places_M[positions, None], PAD)

    def mark(self, negatives: Negatives) -> Tensor:
        """Which negatives their positions see, bool `[M, N]`.

        A negative is looked up once for all positions that share a window and a draw.
        """
        num_positions = len(self.windows_M)
        groups_M = torch.arange(num_positions, device=self.windows_M.device) + negatives.num_before
        groups_M = groups_M // negatives.group_size
        pairs_P2, pairs_M = torch.unique_consecutive(
            torch.stack([self.windows_M, groups_M], dim=1), dim=0, return_inverse=True
        )
        windows_P, groups_P = pairs_P2.unbind(1)
        places_PN = self._find_first(windows_P, negatives.items_GN[groups_P])
        return places_PN[pairs_M] <= self.last_places_M[:, None]

    def _find_first(self, windows_P: Tensor, items_PN: Tensor) -> Tensor:
        """Where items first stand in a window each, int32 `[P, N]`."""
        is_item_BL = self.items_BL >= NUM_SPECIAL
        windows_T, places_T = is_item_BL.nonzero().unbind(1)
        if not len(windows_T):
            return torch.full_like(items_PN, _NEVER, dtype=torch.int32)
        # In the order of windows, items and, as the sort is stable, places.
        keys_T, order_T = _pair(windows_T, self.items_BL[is_item_BL]).sort(stable=True)
        places_T = places_T[order_T].int()

        wanted_PN = _pair(windows_P[:, None], items_PN)
        found_PN = torch.searchsorted(keys_T, wanted_PN).clamp_(max=len(keys_T) - 1)
        return places_T[found_PN].masked_fill_(keys_T[found_PN] != wanted_PN, _NEVER)


def _pair(windows: Tensor, items: Tensor) -> Tensor:
    return (windows << 32) + items

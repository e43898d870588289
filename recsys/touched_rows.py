"""The rows of large tables that a training step looks at, as small tensors of their own.

Of two million items a step looks at some ten thousand. Their rows are copied out, gradients are
taken of the copies, and exchange and update are those of the copies alone, so that what a step
costs no longer grows with the catalogue.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.catalogue import PAD
from recsys.ranks import gather_lists, gather_rows


class TouchedRows:
    """Copies of some rows of tables that have a row an item.

    Args:
        tables: parameters `[I, D]`, each of a width of its own, or `[I]`.
    """

    def __init__(self, tables: list[Tensor]) -> None:
        self.tables = tables
        self._places = {id(table): place for place, table in enumerate(tables)}
        self._rows_U = torch.empty(0, dtype=torch.int64)
        self._copies: list[Tensor] = []

    def open(self, items: Tensor) -> None:
        """Copies the rows of these items, of any shape; on from here they are looked up."""
        padding = torch.tensor([PAD], device=items.device)
        self._rows_U = torch.unique(torch.cat([padding, items.flatten()]))
        self._copies = [table.detach()[self._rows_U].requires_grad_() for table in self.tables]

    def look_up(self, table: Tensor, items: Tensor) -> Tensor:
        """Rows `[..., D]` of items that were opened; padding has no gradient."""
        places = torch.searchsorted(self._rows_U, items.contiguous())
        copy = self._copies[self._places[id(table)]]
        if copy.ndim == 1:
            return F.embedding(places, copy[:, None], padding_idx=0).squeeze(-1)
        return F.embedding(places, copy, padding_idx=0)

    def close(self) -> tuple[Tensor, list[Tensor]]:
        """The rows that any rank looked at, int64 `[U]`, ascending, and for each table their
        gradients, `[U, D]`, means over the ranks. Every rank calls it.
        """
        rows_U = self._rows_U
        grads = [
            torch.zeros_like(copy) if copy.grad is None else copy.grad for copy in self._copies
        ]
        self._copies = []
        (lengths,) = gather_rows(torch.tensor([[len(rows_U)]], device=rows_U.device)).T.tolist()
        if len(lengths) == 1:
            return rows_U, grads
        merged_U, places = torch.unique(gather_lists(rows_U, lengths), return_inverse=True)
        summed = [
            grad.new_zeros(len(merged_U), *grad.shape[1:]).index_add_(
                0, places, gather_lists(grad, lengths)
            )
            for grad in grads
        ]
        return merged_U, [grad / len(lengths) for grad in summed]

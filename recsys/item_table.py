"""Vectors of items: one learned for each id or, with attributes, one for the id and one for each
attribute, added up, so that an item that was never trained on has a vector too.

A table is called with items `[...]` for their vectors `[..., D]`, so that sampled losses compute
what they look at and nothing else; `all()` gives every row at once.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.attributes import AttributeEncoder, ItemCodes
from recsys.catalogue import NUM_SPECIAL, PAD, Catalogue
from recsys.touched_rows import TouchedRows


class ItemTable(nn.Embedding):
    """A vector an item, of its own."""

    def __init__(self, num_rows: int, dim: int, weight_ID: Tensor | None = None) -> None:
        super().__init__(num_rows, dim, padding_idx=PAD, _weight=weight_ID)

        self.touched: TouchedRows | None = None
        """In a training step: where rows are looked up instead."""

    def forward(self, items: Tensor) -> Tensor:
        if self.touched is not None and self.training:
            return self.touched.look_up(self.weight, items)
        return super().forward(items)

    def all(self) -> Tensor:
        """The vectors of all items, `[I, D]`."""
        return self.weight


class ItemFeatures(nn.Module):
    """The attribute codes of every item, and whose ids are hidden.

    An id without a training event has learned nothing and is always hidden. In training others are
    hidden for a step at a time, so that attributes learn to stand for an item alone (id dropout:
    Volkovs et al., 2017, DropoutNet).
    """

    def __init__(self, codes: ItemCodes, counts_I: np.ndarray) -> None:
        super().__init__()
        is_untrained_I = torch.from_numpy(counts_I == 0)
        is_untrained_I[:NUM_SPECIAL] = False
        self.num_codes = codes.num_codes
        self.codes: Tensor
        self.offsets_I: Tensor
        self.unknown_codes_F: Tensor
        self.is_untrained_I: Tensor
        # Not in the weights: an artifact has the catalogue and its encoder, which say the same.
        for name, tensor in {
            "codes": torch.from_numpy(codes.codes),
            "offsets_I": torch.from_numpy(codes.offsets_I),
            "unknown_codes_F": torch.from_numpy(codes.starts_F),
            "is_untrained_I": is_untrained_I,
        }.items():
            self.register_buffer(name, tensor, persistent=False)
        self._drawn_I: Tensor | None = None

    @classmethod
    def build(cls, catalogue: Catalogue, encoder: AttributeEncoder) -> "ItemFeatures | None":
        """The features of a catalogue, None where no attribute is configured."""
        if not encoder.config.fields:
            return None
        return cls(encoder.encode(catalogue), catalogue.counts_I)

    def draw_hidden(self, share: float, generator: torch.Generator) -> None:
        """Hides a new random share of the ids until the next draw, in training alone."""
        device = self.is_untrained_I.device
        uniform_I = torch.rand(len(self.is_untrained_I), generator=generator, device=device)
        uniform_I[:NUM_SPECIAL] = 1
        self._drawn_I = self.is_untrained_I | (uniform_I < share)

    @property
    def is_hidden_I(self) -> Tensor:
        """Whose id may not be looked at now, bool."""
        if self.training and self._drawn_I is not None:
            return self._drawn_I
        return self.is_untrained_I

    def pool(self, weight: Tensor, items: Tensor | None = None) -> Tensor:
        """Sums of the rows of `weight` that belong to the attributes of each item, `[..., D]`; of
        all items `[I, D]` without `items`.
        """
        if items is None:
            return self._bag(weight, self.codes, self.offsets_I)
        first, last = self.offsets_I[items.flatten()], self.offsets_I[items.flatten() + 1]
        lengths = last - first
        ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        # The codes of one item after those of the other: each place is moved to where they lie.
        moved = (first - ends[:-1]).repeat_interleave(lengths)
        places = torch.arange(len(moved), dtype=torch.int32, device=moved.device) + moved
        return self._bag(weight, self.codes[places], ends).view(*items.shape, weight.shape[1])

    @staticmethod
    def _bag(weight: Tensor, codes: Tensor, offsets: Tensor) -> Tensor:
        return F.embedding_bag(codes, weight, offsets, mode="sum", include_last_offset=True)


class AttributedTable(ItemTable):
    """`id + attributes`, where a hidden id adds nothing."""

    def __init__(self, num_rows: int, dim: int, features: ItemFeatures) -> None:
        super().__init__(num_rows, dim)
        self.features = features
        self.attributes = nn.Embedding(features.num_codes, dim)

    def forward(self, items: Tensor) -> Tensor:
        is_hidden = self.features.is_hidden_I[items][..., None]
        ids = super().forward(items).masked_fill(is_hidden, 0)
        return ids + self.features.pool(self.attributes.weight, items)

    def all(self) -> Tensor:
        """The vectors of all items, `[I, D]`, computed now."""
        ids_ID = self.weight.masked_fill(self.features.is_hidden_I[:, None], 0)
        return ids_ID + self.features.pool(self.attributes.weight)


class AttributeBias(nn.Module):
    """What attributes add to the biases of items; that of a hidden id adds nothing.

    In training an item without a training event has a bias of minus infinity: it takes no part in
    the loss, which would teach that what is new is never wanted.
    """

    def __init__(self, features: ItemFeatures) -> None:
        super().__init__()
        self.features = features
        self.attributes = nn.Parameter(torch.zeros(features.num_codes, 1))

    def forward(self, ids: Tensor, items: Tensor | None = None) -> Tensor:
        """Biases of the items `[...]`, or of all `[I]`, from those of their ids."""
        rows = slice(None) if items is None else items
        features = self.features
        ids = ids.masked_fill(features.is_hidden_I[rows], 0)
        biases = ids + features.pool(self.attributes, items).squeeze(-1)
        if self.training:
            return biases.masked_fill(features.is_untrained_I[rows], float("-inf"))
        return biases


class Rows:
    """Rows of a table that are computed when they are indexed, where a tensor would hold all."""

    def __init__(self, compute: Callable[[Tensor | None], Tensor], num_rows: int) -> None:
        self._compute = compute
        self._num_rows = num_rows

    def __getitem__(self, items: Tensor) -> Tensor:
        return self._compute(items)

    def __len__(self) -> int:
        return self._num_rows

    def all(self) -> Tensor:
        """Every row."""
        return self._compute(None)


def all_rows(table: Tensor | Rows) -> Tensor:
    """A table as a tensor, `[I, ...]`."""
    return table if isinstance(table, Tensor) else table.all()


def make_table(num_rows: int, dim: int, features: ItemFeatures | None) -> ItemTable:
    """The table that fits: by attributes where there are features."""
    if features is None:
        return ItemTable(num_rows, dim)
    return AttributedTable(num_rows, dim, features)

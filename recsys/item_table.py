"""Vectors of items: one learned for each id, or one put together from centroids that ids share and,
with attributes, one for each attribute added to it, so that an item that was never trained on has a
vector too.

A table is called with items `[...]` for their vectors `[..., D]`, so that sampled losses compute
what they look at and nothing else; `all()` gives every row at once, and `products` compares every
row with states.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.attributes import AttributeEncoder, ItemCodes
from recsys.catalogue import NUM_SPECIAL, PAD, Catalogue
from recsys.item_codes import ItemCodesConfig
from recsys.touched_rows import TouchedRows

_ALL = slice(None)
_ROWS_PER_BLOCK = 8192
_STATES_PER_GROUP = 32
"""Products of 8 codes x 256 values with so many states, 256 KiB, stay in the cache of a core."""
_LEAST_STATES = 4
"""Rows of fewer numbers are added up several times as slowly."""


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

    def products(self, hidden_BD: Tensor, rows: slice = _ALL) -> Tensor:
        """Inner products with all items, or those of `rows`, `[B, I]`, in the dtype of the
        states.
        """
        return hidden_BD @ self.all()[rows].to(hidden_BD.dtype).T


class RoundedTable(ItemTable):
    """Vectors kept in fp16 or bf16, for a model that is trained no more: read and compared in
    fp32.

    Raises: ValueError when a value is beyond the range of the type.
    """

    def __init__(self, weight_ID: Tensor, dtype: torch.dtype) -> None:
        rounded_ID = weight_ID.detach().to(dtype)
        if not rounded_ID.isfinite().all():
            raise ValueError(
                f"Item vectors reach {weight_ID.abs().max():.3g}, beyond the range of {dtype}; "
                "keep them in fp32 or bf16."
            )
        num_rows, dim = rounded_ID.shape
        super().__init__(num_rows, dim, rounded_ID)
        self.weight.requires_grad_(False)

    def forward(self, items: Tensor) -> Tensor:
        return super().forward(items).float()

    def products(self, hidden_BD: Tensor, rows: slice = _ALL) -> Tensor:
        """Inner products with all items, or those of `rows`, fp32 `[B, I]`."""
        weight_ID, hidden_BD = self.weight[rows], hidden_BD.float()
        if not weight_ID.is_cuda:
            return hidden_BD @ weight_ID.float().T
        # A state in two parts of the table's type is hardly rounded, and the sums are fp32.
        coarse_BD = hidden_BD.to(weight_ID.dtype)
        fine_BD = (hidden_BD - coarse_BD.float()).to(weight_ID.dtype)
        parts = torch.cat([coarse_BD, fine_BD])
        coarse_BI, fine_BI = torch.mm(parts, weight_ID.T, out_dtype=torch.float32).chunk(2)
        return coarse_BI.add_(fine_BI)


class CodedTable(nn.Module):
    """Vectors put together from centroids, of which the codes of an item choose one each (RecJPQ:
    Petrov & Macdonald, 2024, doi:10.1145/3616855.3635821). Only the centroids are learned.

    Codes are drawn at random until others are loaded, see `item_codes`, or come with the weights,
    of which they are a part: all that a published model needs. The vector of the padding is zero.
    """

    touched = None
    """Codes are not learned, and centroids are few: a step updates all of them."""

    def __init__(self, num_rows: int, dim: int, config: ItemCodesConfig) -> None:
        super().__init__()
        C, V = config.length, config.num_values
        self.centroids = nn.Parameter(torch.empty(C, V, dim // C))
        self.codes: Tensor
        self.starts_C: Tensor
        self.register_buffer("codes", torch.randint(V, (num_rows, C), dtype=torch.uint8))
        self.register_buffer("starts_C", torch.arange(C, dtype=torch.int32) * V, persistent=False)
        self.has_codes = False
        """Whether the codes mean anything: False as long as they are those that were drawn."""
        self.register_load_state_dict_post_hook(_find_codes)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    def load_codes(self, codes_IC: Tensor) -> None:
        """Takes the codes of all rows, uint8."""
        self.codes.copy_(codes_IC)
        self.has_codes = True

    def reset_parameters(self) -> None:
        """As vectors of their own begin."""
        nn.init.trunc_normal_(self.centroids, std=0.02)

    def forward(self, items: Tensor) -> Tensor:
        C, V, _ = self.centroids.shape
        places = self._places(self.codes[items]).masked_fill((items == PAD)[..., None], C * V)
        # Behind the centroids stands the zero that padding is made of.
        rows = F.pad(self.centroids.flatten(0, 1), (0, 0, 0, 1))
        return F.embedding(places, rows).flatten(-2)

    def all(self) -> Tensor:
        """The vectors of all items, `[I, D]`, put together now."""
        vectors: Tensor = self(torch.arange(len(self.codes), device=self.codes.device))
        return vectors

    def products(self, hidden_BD: Tensor, rows: slice = _ALL) -> Tensor:
        """Inner products with all items, or those of `rows`, fp32 `[B, I]`: each centroid is
        multiplied once, and an item adds up those of its codes (PQTopK: Petrov, Macdonald &
        Tonellotto, 2024, arXiv:2408.09992). Exact, and no vector of an item is ever put together.
        """
        codes = self.codes[rows]
        num_rows = len(codes)
        step = num_rows if codes.is_cuda else _ROWS_PER_BLOCK
        products_BI = hidden_BD.new_empty(len(hidden_BD), num_rows, dtype=torch.float32)
        partials = {
            start: self._multiply(hidden_BD[start : start + _STATES_PER_GROUP])
            for start in range(0, len(hidden_BD), _STATES_PER_GROUP)
        }
        for start in range(0, num_rows, step):
            block = slice(start, start + step)
            places = self._places(codes[block])
            for first, partial in partials.items():
                summed = F.embedding_bag(places, partial, mode="sum").T
                group_GI = products_BI[first : first + _STATES_PER_GROUP, block]
                group_GI.copy_(summed[: len(group_GI)])
        if not rows.start:
            products_BI[:, PAD] = 0
        return products_BI

    def centroid_products(self, hidden_BD: Tensor) -> Tensor:
        """Products of every centroid with its part of each state, fp32 `[B, C, V]`."""
        C, _, E = self.centroids.shape
        return torch.einsum("cve,bce->bcv", self.centroids, hidden_BD.float().view(-1, C, E))

    def _places(self, codes: Tensor) -> Tensor:
        """Where the chosen centroids lie among all of them, int32 `[..., C]`."""
        return codes.int() + self.starts_C

    def _multiply(self, hidden_GD: Tensor) -> Tensor:
        """Products of every centroid with its part of each state, fp32 `[C * V, at least G]`."""
        C, _, E = self.centroids.shape
        missing = max(0, _LEAST_STATES - len(hidden_GD))
        parts_GCE = F.pad(hidden_GD.float(), (0, 0, 0, missing)).view(-1, C, E)
        return (self.centroids @ parts_GCE.permute(1, 2, 0)).flatten(0, 1)


def _find_codes(table: CodedTable, loaded: Any) -> None:
    """Weights that were loaded had codes among them, unless these are named as missing."""
    table.has_codes = not any(name.endswith(".codes") for name in loaded.missing_keys)


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

    def add_to(self, ids: Tensor, weight: Tensor, items: Tensor | None = None) -> Tensor:
        """Vectors of ids `[..., D]`, hidden ones left out, plus those of the items' attributes."""
        rows = slice(None) if items is None else items
        return ids.masked_fill(self.is_hidden_I[rows][..., None], 0) + self.pool(weight, items)

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
        return self.features.add_to(super().forward(items), self.attributes.weight, items)

    def all(self) -> Tensor:
        """The vectors of all items, `[I, D]`, computed now."""
        return self.features.add_to(super().all(), self.attributes.weight)


class AttributedCodedTable(CodedTable):
    """`centroids of the id + attributes`, where a hidden id adds nothing."""

    def __init__(
        self, num_rows: int, dim: int, config: ItemCodesConfig, features: ItemFeatures
    ) -> None:
        super().__init__(num_rows, dim, config)
        self.features = features
        self.attributes = nn.Embedding(features.num_codes, dim)

    def forward(self, items: Tensor) -> Tensor:
        return self.features.add_to(super().forward(items), self.attributes.weight, items)

    def products(self, hidden_BD: Tensor, rows: slice = _ALL) -> Tensor:
        """Inner products with all items, or those of `rows`, `[B, I]`, in the dtype of the
        states.
        """
        return hidden_BD @ self.all()[rows].to(hidden_BD.dtype).T


Table = ItemTable | CodedTable
"""Whatever gives items their vectors."""


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


def make_table(
    num_rows: int, dim: int, features: ItemFeatures | None, codes: ItemCodesConfig | None = None
) -> Table:
    """The table that fits: put together from codes where there are any, and by attributes where
    there are features.
    """
    if codes is not None:
        return (
            CodedTable(num_rows, dim, codes)
            if features is None
            else AttributedCodedTable(num_rows, dim, codes, features)
        )
    return (
        ItemTable(num_rows, dim) if features is None else AttributedTable(num_rows, dim, features)
    )

"""Of which kind a new item is: the trained items that share the most attributes with it."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.attributes import AttributeEncoder, AttributesConfig, ItemCodes
from recsys.catalogue import Catalogue

_CATEGORICAL = ("category", "brand")
_BANDS = ("price",)
_LEVELS = ((), ("category",), (*_CATEGORICAL, *_BANDS))
"""What the items of one kind share, from coarse to fine; columns that a catalogue lacks are left
out."""


@dataclass(frozen=True)
class Kinds:
    """Trained items, sorted by what they share, and the kind of each of N new items."""

    members: Tensor
    """int64, rows of trained items, kind after kind."""
    offsets_K: Tensor
    """int64, where the members of each kind begin."""
    kind_N: np.ndarray
    """int64, -1 where no trained item shares as much."""

    @classmethod
    def match(cls, members: np.ndarray, keys: np.ndarray, new_keys_N: np.ndarray) -> "Kinds":
        """Items with the same key are of one kind; a new item with a key of its own is of none."""
        order = np.argsort(keys, kind="stable")
        keys_K, offsets_K = np.unique(keys[order], return_index=True)
        places_N = np.searchsorted(keys_K, new_keys_N)
        is_there_N = np.isin(new_keys_N, keys_K)
        return cls(
            torch.from_numpy(members[order].astype(np.int64)),
            torch.from_numpy(offsets_K.astype(np.int64)),
            np.where(is_there_N, places_N, -1),
        )

    def means(self, table_ID: Tensor) -> Tensor:
        """The mean row of the members of each kind, `[K, D]`."""
        return F.embedding_bag(self.members, table_ID, self.offsets_K, mode="mean")


def find_kinds(
    known: Catalogue, trained: np.ndarray, grown: Catalogue, new: np.ndarray
) -> list[Kinds]:
    """Three sortings: all items are of one kind, those of a category are, those that also have the
    brand and the band of prices in common.

    Args:
        known: the catalogue of a trained model.
        trained: rows of it that training has seen.
        grown: the catalogue with the new items.
        new: the rows of these.
    """
    encoder = _learn(known, grown)
    fields = encoder.config.fields
    codes, grown_codes = encoder.encode(known), encoder.encode(grown)
    found = []
    for level in _LEVELS:
        shared = np.array([fields.index(name) for name in level if name in fields], np.int64)
        keys_I, is_known_I = _keys(codes, shared)
        new_keys_I, is_new_known_I = _keys(grown_codes, shared)
        members = trained[is_known_I[trained]]
        kinds = Kinds.match(members, keys_I[members], new_keys_I[new])
        # What is unknown of two items is nothing that they share.
        kind_N = np.where(is_new_known_I[new], kinds.kind_N, -1)
        found.append(Kinds(kinds.members, kinds.offsets_K, kind_N))
    return found


def mean_of_kind(kinds: list[Kinds], table_ID: Tensor) -> Tensor:
    """For each new item the mean of the rows of the finest kind that it is of, `[N, D]`: its scores
    are then the mean of theirs.
    """
    means_ND = table_ID.new_zeros(len(kinds[0].kind_N), table_ID.shape[1])
    for level in kinds:
        places = np.flatnonzero(level.kind_N >= 0)
        means_ND[places] = level.means(table_ID)[level.kind_N[places]]
    return means_ND


def _learn(known: Catalogue, grown: Catalogue) -> AttributeEncoder:
    there = set(known.table.column_names) & set(grown.table.column_names)
    config = AttributesConfig(
        categorical=tuple(name for name in _CATEGORICAL if name in there),
        bands=tuple(name for name in _BANDS if name in there),
    )
    return AttributeEncoder.learn(config, known)


def _keys(codes: ItemCodes, shared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A number for what each row has in the shared fields, int64 `[I]`, and whether all of it is
    known.
    """
    field_C = np.searchsorted(codes.starts_F, np.arange(codes.num_codes), side="right") - 1
    # A sum of random numbers stands for a set of codes: an item may have several of one field.
    numbers_C = np.random.default_rng(0).integers(2**62, size=codes.num_codes)
    keys_I = _sums(codes, numbers_C * np.isin(field_C, shared))
    is_unknown_C = np.zeros(codes.num_codes, np.int64)
    is_unknown_C[codes.starts_F[shared]] = 1
    return keys_I, _sums(codes, is_unknown_C) == 0


def _sums(codes: ItemCodes, values_C: np.ndarray) -> np.ndarray:
    """The sum of the values of each row's codes, int64 `[I]`, beyond 2^63 from the other end."""
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(values_C[codes.codes])])
    sums_I: np.ndarray = np.diff(sums[codes.offsets_I])
    return sums_I

"""Item codes: a few bytes an item that say which of the shared centroids its vector is made of.

Items that the same users wanted get similar codes, which are learned once, before training (RecJPQ:
Petrov & Macdonald, 2024, doi:10.1145/3616855.3635821). `item_table.CodedTable` is made of them.
"""

from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from recsys.attributes import AttributeEncoder, AttributesConfig
from recsys.catalogue import Catalogue
from recsys.interactions import blocks_of, history_matrix
from recsys.ranks import agree_on
from recsys.splits import Split
from recsys.tokens import TokenStore

_ITERATIONS = 4
_OVERSAMPLING = 8
_EVENTS_PER_BLOCK = 2**22
"""A block of so many takes about 300 MB."""


class ItemCodesConfig(BaseModel):
    """How many codes an item has, and where they come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    length: int = Field(8, ge=1)
    """Codes of an item, a byte each; `dim` is divided among them."""
    num_values: int = Field(256, ge=2, le=256)
    """Values of a code; each has a centroid."""
    source: Literal["svd", "attributes", "random"] = "svd"
    """svd: who wanted what in training; attributes: these first, what is left by svd; random: what
    the other two are held against."""
    attributes: AttributesConfig = AttributesConfig()
    """attributes: columns of the catalogue that fill a code each. Values beyond the most frequent
    `num_values - 1` are unknown; of several values of an item the least frequent counts."""

    @model_validator(mode="after")
    def _has_its_own_attributes(self) -> "ItemCodesConfig":
        num_fields = len(self.attributes.fields)
        if self.source == "attributes" and not 1 <= num_fields <= self.length:
            raise ValueError(
                f"source 'attributes' takes 1 to {self.length} attributes, as many as length, not "
                f"{num_fields}; name them in item_codes.attributes"
            )
        if self.source != "attributes" and num_fields:
            raise ValueError(f"source {self.source!r} has no attributes; leave them out")
        return self


def learn_codes(
    config: ItemCodesConfig, store: TokenStore, split: Split, catalogue: Catalogue, *, seed: int
) -> np.ndarray:
    """Codes of every catalogue row, uint8 `[I, C]`, from training events and attributes alone.

    What attributes leave is cut from the factors of the users' training items, each factor into
    `num_values` bins of equal size among the items that have a training event. All other rows, the
    mask's too, have no factor and fall into bins at random.

    Raises: CatalogueError when the catalogue lacks an attribute.
    """
    rng = np.random.default_rng(seed)
    known_IF = _encode_attributes(config, catalogue)
    num_left = config.length - known_IF.shape[1]
    factors_IC = np.zeros((catalogue.num_rows, num_left), np.float32)
    if config.source != "random" and num_left:
        found = factor_items(store, split, catalogue.num_rows, num_left, rng)
        # A catalogue with fewer rows than codes has fewer factors.
        factors_IC[:, : found.shape[1]] = found

    cut_IC = np.empty(factors_IC.shape, np.uint8)
    is_trained_I = catalogue.counts_I > 0
    for rows in (np.flatnonzero(is_trained_I), np.flatnonzero(~is_trained_I)):
        for code in range(num_left):
            cut_IC[rows, code] = _cut_equally(factors_IC[rows, code], config.num_values, rng)
    return np.concatenate([known_IF, cut_IC], axis=1)


def agree_on_codes(
    config: ItemCodesConfig,
    store: TokenStore,
    split: Split,
    catalogue: Catalogue,
    *,
    seed: int,
    device: torch.device,
) -> Tensor:
    """`learn_codes` by the first rank, which gives them to the others: every rank calls this."""
    return agree_on(
        lambda: torch.from_numpy(learn_codes(config, store, split, catalogue, seed=seed)),
        torch.zeros(catalogue.num_rows, config.length, dtype=torch.uint8),
        device,
    )


def factor_items(
    store: TokenStore, split: Split, num_rows: int, num_factors: int, rng: np.random.Generator
) -> np.ndarray:
    """The leading right singular vectors of "which user had which item in training", one a column,
    fp32 `[I, num_factors]`, the strongest first; fewer columns where there are fewer rows.

    By subspace iteration (Halko et al., 2011, doi:10.1137/090771806) on the product of the matrix
    with itself: five passes over the events, block by block, so that memory is that of a few arrays
    of `num_factors + 8` numbers an item and one block, whatever the number of users.
    """
    width = min(num_factors + _OVERSAMPLING, num_rows)
    basis = rng.standard_normal((num_rows, width), dtype=np.float32)
    for _ in range(_ITERATIONS):
        basis, _ = np.linalg.qr(_cooccur(store, split, basis))
    _, rotation = np.linalg.eigh(basis.T @ _cooccur(store, split, basis))
    strongest_first = rotation[:, ::-1][:, :num_factors]
    factors: np.ndarray = basis @ strongest_first
    return factors


def _cooccur(store: TokenStore, split: Split, basis: np.ndarray) -> np.ndarray:
    """`A.T @ (A @ basis)`, A being which user had which item in training, `[U, I]`."""
    product = np.zeros_like(basis)
    starts_U, ends_U = store.offsets_U[:-1], split.train_end_U
    for first, last in blocks_of(ends_U - starts_U, _EVENTS_PER_BLOCK):
        had_BI = history_matrix(store, starts_U[first:last], ends_U[first:last], len(basis))
        product += had_BI.T @ (had_BI @ basis)
    return product


def _cut_equally(values: np.ndarray, num_values: int, rng: np.random.Generator) -> np.ndarray:
    """The bin of each value, bins being of equal size; equal values fall at random."""
    order = np.lexsort((rng.random(len(values)), values))
    bins = np.empty(len(values), np.uint8)
    bins[order] = np.arange(len(values)) * num_values // max(len(values), 1)
    return bins


def _encode_attributes(config: ItemCodesConfig, catalogue: Catalogue) -> np.ndarray:
    """The code of each attribute, uint8 `[I, F]`; 0 means unknown."""
    attributes, most = config.attributes, config.num_values - 1
    fitting = attributes.model_copy(
        update={
            "max_values": min(attributes.max_values, most),
            "num_bands": min(attributes.num_bands, most),
        }
    )
    found = AttributeEncoder.learn(fitting, catalogue).encode(catalogue)
    codes_IF = np.zeros((catalogue.num_rows, len(fitting.fields)), np.uint8)
    rows = np.repeat(np.arange(catalogue.num_rows), np.diff(found.offsets_I))
    fields = np.searchsorted(found.starts_F, found.codes, side="right") - 1
    # Codes of a row ascend, so that the last of a field, the least frequent, is the one that stays.
    codes_IF[rows, fields] = found.codes - found.starts_F[fields]
    return codes_IF

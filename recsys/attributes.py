"""Attributes of items as integer codes, learned from the catalogue: what an item that nobody has
touched yet is known by.

Each field has codes of its own. The first of them means unknown: a missing value, or one that no
trained item has, or one beyond the most frequent.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, model_validator

from recsys.catalogue import NUM_SPECIAL, Catalogue
from recsys.errors import CatalogueError

UNKNOWN = 0


class AttributesConfig(BaseModel):
    """Which columns of the items table become part of an item's vector; none by default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    categorical: tuple[str, ...] = ()
    """Text or integers, e.g. category; or lists of them where an item has several, e.g. genres."""
    bands: tuple[str, ...] = ()
    """Numbers that are cut into bands of about as many items each, e.g. price."""
    max_values: int = Field(10_000, ge=1)
    """Values of a categorical field that are told apart, the most frequent; others are unknown."""
    num_bands: int = Field(10, ge=2, le=1000)

    @model_validator(mode="after")
    def _names_once(self) -> "AttributesConfig":
        twice = sorted({name for name in self.fields if self.fields.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is named twice; name each attribute once")
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        return self.categorical + self.bands


@dataclass(frozen=True)
class ItemCodes:
    """Codes of catalogue row `i` are `codes[offsets_I[i]:offsets_I[i + 1]]`, each once and in the
    order of the fields; padding and mask have none.
    """

    codes: np.ndarray
    """int32, flat."""
    offsets_I: np.ndarray
    """int32 `[I + 1]`."""
    starts_F: np.ndarray
    """int64, the first code of each field, which means unknown."""
    num_codes: int


@dataclass(frozen=True)
class AttributeEncoder:
    """Turns the attributes of a catalogue into codes.

    `vocabularies` holds the known values of each categorical field, as text, and `edges` the lower
    bounds of all bands but the first.
    """

    config: AttributesConfig
    vocabularies: Mapping[str, tuple[str, ...]]
    edges: Mapping[str, tuple[float, ...]]

    @classmethod
    def learn(cls, config: AttributesConfig, catalogue: Catalogue) -> "AttributeEncoder":
        """Values and quantiles of the items that have training events: no other value has a
        vector that means anything.

        Raises: CatalogueError when a column is missing, or has bands and is not numeric.
        """
        is_trained = pa.array(catalogue.counts_I[NUM_SPECIAL:] > 0)
        vocabularies = {
            name: _most_frequent(catalogue.column(name).filter(is_trained), config.max_values)
            for name in config.categorical
        }
        edges = {
            name: _inner_quantiles(_numbers(catalogue, name)[is_trained], config.num_bands)
            for name in config.bands
        }
        return cls(config, vocabularies, edges)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of codes of each field, the unknown one included."""
        return tuple(len(self.vocabularies[name]) + 1 for name in self.config.categorical) + tuple(
            len(self.edges[name]) + 2 for name in self.config.bands
        )

    def encode(self, catalogue: Catalogue) -> ItemCodes:
        """Codes of every catalogue row. Raises CatalogueError when a column is missing."""
        num_codes = sum(self.sizes)
        starts_F = np.array([0, *accumulate(self.sizes)][:-1], np.int64)
        # One sorted number a pair of row and code: sorting orders both and drops repetitions.
        pairs = [np.zeros(0, np.int64)]
        for start, name in zip(starts_F, self.config.fields, strict=True):
            rows, codes = self._encode_field(catalogue, name)
            pairs.append((rows + NUM_SPECIAL) * num_codes + start + codes)
        rows, codes = np.divmod(_sorted_once(np.concatenate(pairs)), max(num_codes, 1))
        ends_I = np.bincount(rows, minlength=catalogue.num_rows).cumsum()
        offsets_I = np.concatenate([[0], ends_I]).astype(np.int32)
        return ItemCodes(codes.astype(np.int32), offsets_I, starts_F, num_codes)

    def write(self, path: Path) -> None:
        content = {
            "config": self.config.model_dump(mode="json"),
            "vocabularies": self.vocabularies,
            "edges": self.edges,
        }
        path.write_text(json.dumps(content, indent=1))

    @classmethod
    def read(cls, path: Path) -> "AttributeEncoder":
        """The counterpart of `write`; an encoder without a field where there is no such file."""
        if not path.exists():
            return NO_ATTRIBUTES
        content = json.loads(path.read_text())
        return cls(
            AttributesConfig.model_validate(content["config"]),
            {name: tuple(values) for name, values in content["vocabularies"].items()},
            {name: tuple(values) for name, values in content["edges"].items()},
        )

    def _encode_field(self, catalogue: Catalogue, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the catalogue's table and their codes; a row with several values comes often."""
        if name in self.edges:
            numbers = _numbers(catalogue, name)
            bands = 1 + np.searchsorted(self.edges[name], numbers, side="right")
            return np.arange(len(numbers)), np.where(np.isnan(numbers), UNKNOWN, bands)
        rows, values = _rows_and_values(catalogue.column(name))
        known = pc.index_in(values, pa.array(self.vocabularies[name], pa.string()))
        codes = pc.fill_null(pc.add(known, 1), UNKNOWN).to_numpy(zero_copy_only=False)
        has_value_I = np.zeros(catalogue.num_items, bool)
        has_value_I[rows] = True
        without = np.flatnonzero(~has_value_I)
        return (
            np.concatenate([rows, without]),
            np.concatenate([codes, np.full(len(without), UNKNOWN)]),
        )


NO_ATTRIBUTES = AttributeEncoder(AttributesConfig(), {}, {})
"""For items that are known by their ids alone."""


def _rows_and_values(column: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Each value as text beside its row; the values of a list share theirs."""
    if pa.types.is_nested(column.type):
        rows = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
        return rows.astype(np.int64), pc.list_flatten(column).cast(pa.string())
    return np.arange(len(column)), column.cast(pa.string())


def _sorted_once(numbers: np.ndarray) -> np.ndarray:
    """Each number once, ascending: np.unique by a table of hashes takes ten times as long."""
    ordered = np.sort(numbers)
    is_first = np.ones(len(ordered), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return ordered[is_first]


def _most_frequent(column: pa.Array, limit: int) -> tuple[str, ...]:
    counts = pc.value_counts(_rows_and_values(column)[1].drop_null())
    pairs = zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)
    ordered = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
    return tuple(value for value, _ in ordered[:limit])


def _numbers(catalogue: Catalogue, name: str) -> np.ndarray:
    column = catalogue.column(name)
    try:
        numbers: np.ndarray = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise CatalogueError(
            f"The column {name!r} holds {column.type} and cannot be cut into bands; name it in "
            "attributes.categorical instead."
        ) from error
    return numbers


def _inner_quantiles(numbers: np.ndarray, num_bands: int) -> tuple[float, ...]:
    known = numbers[~np.isnan(numbers)]
    if len(known) == 0:
        return ()
    quantiles = np.quantile(known, np.arange(1, num_bands) / num_bands)
    return tuple(np.unique(quantiles).tolist())

"""What a request may ask of the items themselves, and an index of the catalogue that answers it
quickly.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.catalogue import NUM_SPECIAL, PAD, Catalogue

ItemId = int | str


class FilterError(ValueError):
    """A filter asks for an attribute that the catalogue does not have."""


@dataclass(frozen=True)
class AttributeFilter:
    """Conditions on catalogue attributes; an item that lacks a wanted attribute does not pass."""

    include_categories: frozenset[str] = frozenset()
    """Only these; empty for all."""
    exclude_categories: frozenset[str] = frozenset()
    """None of these; an item without a category passes."""
    available_only: bool = False
    min_price: float | None = None
    max_price: float | None = None

    @property
    def columns(self) -> frozenset[str]:
        """Attributes that the catalogue must have."""
        wanted = {
            "category": bool(self.include_categories or self.exclude_categories),
            "available": self.available_only,
            "price": self.min_price is not None or self.max_price is not None,
        }
        return frozenset(name for name, is_wanted in wanted.items() if is_wanted)


class ItemIndex:
    """The catalogue for single requests: ids by hash, and filters as masks, of which the last 64
    are kept.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.num_rows = catalogue.num_rows
        self.counts_I = catalogue.counts_I
        self._catalogue = catalogue
        self._has_integer_ids = pa.types.is_integer(catalogue.item_ids.type)
        self._item_ids: list[ItemId] = catalogue.item_ids.to_pylist()
        self._items = {
            item_id: item for item, item_id in enumerate(self._item_ids, start=NUM_SPECIAL)
        }
        self._cached_mask = lru_cache(maxsize=64)(self._compute_mask)

    def encode(self, item_ids: Sequence[ItemId]) -> np.ndarray:
        """Dense items, int64; PAD where the catalogue does not know the id. 42 and "42" are the
        same id.
        """
        items = (self._items.get(self._own_type(item_id), PAD) for item_id in item_ids)
        return np.fromiter(items, np.int64, len(item_ids))

    def decode(self, items: Iterable[int]) -> list[ItemId]:
        """The shop's ids of dense items."""
        return [self._item_ids[item - NUM_SPECIAL] for item in items]

    def allowed_mask(self, wanted: AttributeFilter) -> np.ndarray:
        """Which rows pass, bool `[I]`, read-only; padding and mask never do.

        Raises: FilterError when the catalogue lacks an attribute.
        """
        return self._cached_mask(wanted)

    @cached_property
    def by_count(self) -> np.ndarray:
        """Every item, most training events first, int64 `[I - 2]`."""
        return np.argsort(-self.counts_I[NUM_SPECIAL:], kind="stable") + NUM_SPECIAL

    def _own_type(self, item_id: ItemId) -> ItemId | None:
        if not self._has_integer_ids:
            return str(item_id)
        try:
            return int(item_id)
        except ValueError:
            return None

    def _compute_mask(self, wanted: AttributeFilter) -> np.ndarray:
        missing = sorted(wanted.columns - set(self._catalogue.table.column_names))
        if missing:
            raise FilterError(
                f"The catalogue has no {' and no '.join(missing)}, so it cannot be filtered by it; "
                "leave that filter out or publish a catalogue that has it."
            )
        allowed_I = np.ones(self.num_rows, bool)
        allowed_I[:NUM_SPECIAL] = False
        items_I = allowed_I[NUM_SPECIAL:]
        if wanted.include_categories:
            items_I &= self._is_in_category(wanted.include_categories)
        if wanted.exclude_categories:
            items_I &= ~self._is_in_category(wanted.exclude_categories)
        if wanted.available_only:
            items_I &= _as_numpy(pc.fill_null(self._catalogue.column("available"), False))
        if "price" in wanted.columns:
            items_I &= self._is_priced(wanted.min_price, wanted.max_price)
        allowed_I.flags.writeable = False
        return allowed_I

    def _is_in_category(self, categories: frozenset[str]) -> np.ndarray:
        column = self._catalogue.column("category").cast(pa.string())
        return _as_numpy(pc.is_in(column, pa.array(sorted(categories), pa.string())))

    def _is_priced(self, lowest: float | None, highest: float | None) -> np.ndarray:
        # A missing price is NaN, and NaN fails both comparisons.
        prices_I = _as_numpy(self._catalogue.column("price").cast(pa.float64()))
        is_above = prices_I >= (-np.inf if lowest is None else lowest)
        return is_above & (prices_I <= (np.inf if highest is None else highest))


def _as_numpy(values: pa.Array) -> np.ndarray:
    array: np.ndarray = values.to_numpy(zero_copy_only=False)
    return array

"""The items that a model knows: the shop's ids, dense indices, counts and attributes."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.errors import CatalogueError

PAD = 0
MASK = 1
NUM_SPECIAL = 2


@dataclass(frozen=True)
class Catalogue:
    """`table` has a row an item, in index order: item `i` is row `i - NUM_SPECIAL`.

    Columns: `item_id` (int64 or string, unique), `count` (int64, training events), then attributes.
    """

    table: pa.Table

    def __post_init__(self) -> None:
        if self.num_items == 0:
            raise CatalogueError("The catalogue has no item; ingest events first.")

    @classmethod
    def build(
        cls,
        item_ids: pa.Array,
        counts: np.ndarray,
        items: pa.Table | None,
        *,
        with_unseen: bool = False,
    ) -> "Catalogue":
        """From distinct `item_ids` with their training `counts`, attributes joined from `items` by
        item_id; `with_unseen` adds the available ones of `items` that are not among them.
        """
        if with_unseen and items is not None:
            unseen = _available(items)
            unseen = unseen.filter(pc.invert(pc.is_in(unseen, item_ids)))
            item_ids = pa.concat_arrays([item_ids, unseen.cast(item_ids.type)])
            counts = np.concatenate([counts, np.zeros(len(unseen), np.int64)])
        order = pc.sort_indices(item_ids)
        table = pa.table({"item_id": item_ids.take(order), "count": pa.array(counts).take(order)})
        if items is None:
            return cls(table)
        rows = pc.index_in(table["item_id"], items["item_id"].combine_chunks())
        for name in items.column_names:
            if name not in ("item_id", "count"):
                table = table.append_column(
                    name, items[name].combine_chunks().take(rows.combine_chunks())
                )
        return cls(table)

    @property
    def num_items(self) -> int:
        return int(self.table.num_rows)

    @property
    def num_rows(self) -> int:
        """Rows of an item table: the items, padding and mask."""
        return self.num_items + NUM_SPECIAL

    @cached_property
    def item_ids(self) -> pa.Array:
        return self.table["item_id"].combine_chunks()

    @cached_property
    def counts_I(self) -> np.ndarray:
        """Training events of each row, int64; padding and mask have none."""
        return np.concatenate([np.zeros(NUM_SPECIAL, np.int64), self.table["count"].to_numpy()])

    def encode(self, item_ids: pa.Array | list[int] | list[str]) -> np.ndarray:
        """Dense indices, int32; PAD where the catalogue does not know the id."""
        known = pc.index_in(self._as_ids(item_ids), self.item_ids)
        items: np.ndarray = pc.fill_null(pc.add(known, NUM_SPECIAL), PAD).to_numpy(
            zero_copy_only=False
        )
        return items.astype(np.int32)

    def decode(self, items: np.ndarray) -> pa.Array:
        """The shop's ids of dense indices; PAD and MASK are an error of the caller."""
        return self.item_ids.take(pa.array(np.asarray(items, np.int64) - NUM_SPECIAL))

    def column(self, name: str) -> pa.Array:
        """One attribute in index order, without the special rows. Raises CatalogueError if there is
        none.
        """
        if name not in self.table.column_names:
            raise CatalogueError(
                f"The catalogue has no column {name!r}; it has: "
                f"{', '.join(self.table.column_names)}."
            )
        return self.table[name].combine_chunks()

    def write(self, path: Path) -> None:
        pq.write_table(self.table, path, compression="zstd")

    @classmethod
    def read(cls, path: Path) -> "Catalogue":
        return cls(pq.read_table(path))

    def _as_ids(self, item_ids: pa.Array | list[int] | list[str]) -> pa.Array:
        # A shop may send 42 or "42": both are read in the catalogue's own type.
        if not isinstance(item_ids, pa.Array):
            return pa.array(
                [_as_type(item_id, self.item_ids.type) for item_id in item_ids], self.item_ids.type
            )
        return (
            item_ids if item_ids.type == self.item_ids.type else item_ids.cast(self.item_ids.type)
        )


def _available(items: pa.Table) -> pa.Array:
    """Ids of what is not sold out; an item that does not say so is there."""
    item_ids = items["item_id"].combine_chunks()
    if "available" not in items.column_names:
        return item_ids
    return item_ids.filter(pc.fill_null(items["available"].combine_chunks(), True))


def _as_type(item_id: int | str, kind: pa.DataType) -> int | str | None:
    if not pa.types.is_integer(kind):
        return str(item_id)
    try:
        number = int(item_id)
    except ValueError:
        return None
    return number if -(2**63) <= number < 2**63 else None

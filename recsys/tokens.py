"""Sequences of all users as flat arrays: tokens and the offsets of users among them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from recsys.catalogue import PAD, Catalogue
from recsys.context import NO_TIME, ContextEncoder


@dataclass(frozen=True)
class TokenStore:
    """Events of user `u` are the tokens `offsets_U[u]:offsets_U[u + 1]`, oldest first."""

    user_ids: pa.Array
    offsets_U: np.ndarray
    """int64 `[U + 1]`."""
    items_T: np.ndarray
    """int32 `[T]`, dense indices."""
    context_TF: np.ndarray
    """uint8 `[T, F]`, codes of `ContextEncoder`."""
    timestamps_T: np.ndarray
    """int64 `[T]`, microseconds in UTC."""

    @property
    def num_users(self) -> int:
        return len(self.offsets_U) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.items_T)

    @classmethod
    def from_sequences(
        cls, sequences: pa.Table, catalogue: Catalogue, encoder: ContextEncoder
    ) -> "TokenStore":
        """Encodes rows of the `sequences` table, which have a list column for each context field;
        items that the catalogue does not know are left out.
        """
        sequences = sequences.combine_chunks()
        lists = _first_chunk(sequences["item_ids"])
        items_T = catalogue.encode(lists.flatten())
        is_known_T = items_T != PAD
        lengths_U = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        users_T = np.repeat(np.arange(len(lengths_U)), lengths_U)[is_known_T]
        offsets_U = np.concatenate(
            [[0], np.cumsum(np.bincount(users_T, minlength=len(lengths_U)))]
        ).astype(np.int64)

        keep = pa.array(is_known_T)
        timestamps_T = (
            _first_chunk(sequences["timestamps"]).flatten().cast(pa.int64()).to_numpy()[is_known_T]
        )
        columns = {
            name: _first_chunk(sequences[list_column(name)]).flatten().filter(keep)
            for name in encoder.config.categorical
            if name != "segment"
        }
        columns["segment"] = _first_chunk(sequences["segment"]).take(pa.array(users_T))
        context_TF = encoder.encode(timestamps_T, previous_times(timestamps_T, offsets_U), columns)
        return cls(
            _first_chunk(sequences["user_id"]),
            offsets_U,
            items_T[is_known_T],
            context_TF,
            timestamps_T,
        )

    def to_arrow(self) -> pa.Table:
        """A row a user, as Ray Data carries it; `from_arrow` is the way back."""
        offsets = pa.array(self.offsets_U)
        width = self.context_TF.shape[1]
        context = pa.array(self.context_TF.reshape(-1))
        return pa.table(
            {
                "user_id": self.user_ids,
                "items": pa.LargeListArray.from_arrays(offsets, pa.array(self.items_T)),
                "context": pa.LargeListArray.from_arrays(pa.array(self.offsets_U * width), context),
                "timestamps": pa.LargeListArray.from_arrays(offsets, pa.array(self.timestamps_T)),
            }
        )

    @classmethod
    def from_arrow(cls, table: pa.Table, num_fields: int) -> "TokenStore":
        """The counterpart of `to_arrow`; `num_fields` is F."""
        lists = _first_chunk(table["items"])
        lengths_U = lists.value_lengths().to_numpy(zero_copy_only=False)
        return cls(
            _first_chunk(table["user_id"]),
            np.concatenate([[0], np.cumsum(lengths_U)]).astype(np.int64),
            lists.flatten().to_numpy(),
            _first_chunk(table["context"]).flatten().to_numpy().reshape(-1, num_fields)
            if num_fields
            else np.zeros((len(lists.flatten()), 0), np.uint8),
            _first_chunk(table["timestamps"]).flatten().to_numpy(),
        )

    @classmethod
    def concatenate(cls, stores: Sequence["TokenStore"]) -> "TokenStore":
        """One store of several, users in the order given."""
        lengths_U = np.concatenate([np.diff(store.offsets_U) for store in stores])
        return cls(
            pa.concat_arrays([store.user_ids for store in stores]),
            np.concatenate([[0], np.cumsum(lengths_U)]).astype(np.int64),
            np.concatenate([store.items_T for store in stores]),
            np.concatenate([store.context_TF for store in stores]),
            np.concatenate([store.timestamps_T for store in stores]),
        )


def list_column(field: str) -> str:
    """The list column of the `sequences` table that holds a context field a position; what the shop
    itself added keeps its name.
    """
    return {"device": "devices", "event_type": "event_types"}.get(field, field)


def previous_times(timestamps_T: np.ndarray, offsets_U: np.ndarray) -> np.ndarray:
    """Time of the event before, int64 `[T]`; NO_TIME at the first event of a user."""
    previous_T = np.empty_like(timestamps_T)
    previous_T[1:] = timestamps_T[:-1]
    starts_U = offsets_U[:-1]
    previous_T[starts_U[starts_U < len(previous_T)]] = NO_TIME
    return previous_T


def _first_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

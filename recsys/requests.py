"""Requests of all users at the same moment, as the last tokens of a store: what `recsys.queries`
makes of single requests, column by column.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from recsys.catalogue import PAD, Catalogue
from recsys.context import NO_TIME, ContextEncoder
from recsys.tokens import TokenStore, list_column

_TOLD = ("device", "event_type", "segment")
"""Fields that an event of a history may have; those of a shop's own stand at requests alone."""


def read_requests(
    users: pa.Table, catalogue: Catalogue, encoder: ContextEncoder, asked_us: int
) -> TokenStore:
    """Histories of the `sequences` table, each with a request of its user behind it.

    Users keep their places; one of whom the catalogue knows no item has the request alone.

    Args:
        asked_us: the moment of all requests, microseconds in UTC.
    """
    users = users.combine_chunks()
    for name in encoder.config.categorical:
        if name not in _TOLD:
            users = _with_unknown(users, list_column(name))
    store = TokenStore.from_sequences(users, catalogue, encoder)
    return append_requests(store, users["segment"].combine_chunks(), encoder, asked_us)


def append_requests(
    store: TokenStore, segments: pa.Array, encoder: ContextEncoder, asked_us: int
) -> TokenStore:
    """The store with one token more a user: its request, of which the moment and the segment are
    known, and no device.
    """
    starts_U, ends_U = store.offsets_U[:-1], store.offsets_U[1:]
    latest_U = np.full(store.num_users, NO_TIME)
    is_known_U = ends_U > starts_U
    latest_U[is_known_U] = store.timestamps_T[ends_U[is_known_U] - 1]
    asked_U = np.full(store.num_users, asked_us)
    codes_UF = encoder.encode(asked_U, latest_U, {"segment": segments})
    return replace(
        store,
        offsets_U=store.offsets_U + np.arange(store.num_users + 1),
        items_T=np.insert(store.items_T, ends_U, PAD),
        context_TF=np.insert(store.context_TF, ends_U, codes_UF, axis=0),
        timestamps_T=np.insert(store.timestamps_T, ends_U, asked_us),
    )


def _with_unknown(users: pa.Table, name: str) -> pa.Table:
    """A list column more, as long as the histories, that tells nothing."""
    lists = users["item_ids"].combine_chunks()
    unknown = pa.nulls(len(lists.flatten()), pa.string())
    column = pa.ListArray.from_arrays(_offsets(lists), unknown)
    if name in users.column_names:
        users = users.drop_columns([name])
    return users.append_column(name, column)


def _offsets(lists: pa.ListArray) -> pa.Array:
    lengths_U = lists.value_lengths().to_numpy(zero_copy_only=False)
    return pa.array(np.concatenate([[0], np.cumsum(lengths_U)]), pa.int32())

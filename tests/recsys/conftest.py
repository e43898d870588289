"""Stores of a few events, written out in the test."""

import numpy as np
import pyarrow as pa
import pytest

from recsys.catalogue import NUM_SPECIAL
from recsys.splits import Split
from recsys.tokens import TokenStore


@pytest.fixture
def make_store():
    """Builds a store of lists of item numbers (0 is the first item), one list a user."""

    def make(sequences, days=None):
        lengths = [len(sequence) for sequence in sequences]
        items_T = np.concatenate([np.array(sequence) for sequence in sequences]) + NUM_SPECIAL
        offsets_U = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        days_T = np.arange(len(items_T)) if days is None else np.concatenate(days)
        return TokenStore(
            pa.array([f"u{user}" for user in range(len(sequences))]),
            offsets_U,
            items_T.astype(np.int32),
            np.zeros((len(items_T), 0), np.uint8),
            days_T.astype(np.int64) * 86_400_000_000,
        )

    return make


@pytest.fixture
def hold_out_last():
    """Splits a store: everything but each user's last event trains, the last event tests."""

    def split(store):
        ends_U = store.offsets_U[1:]
        return Split(ends_U - 1, np.full(len(ends_U), -1), ends_U - 1)

    return split

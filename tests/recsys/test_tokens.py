"""Sequences as flat tokens."""

import numpy as np
import pyarrow as pa
import pytest

from recsys.catalogue import Catalogue
from recsys.context import NO_TIME, ContextConfig, ContextEncoder
from recsys.tokens import TokenStore, previous_times

CATALOGUE = Catalogue(pa.table({"item_id": ["a", "b", "c"], "count": [1, 1, 1]}))
ENCODER = ContextEncoder.learn(
    ContextConfig(categorical=("device", "segment"), time=("gap",)),
    {"device": {"app": 2, "web": 1}, "segment": {"new": 1}},
)


def make_sequences(**item_ids):
    lists = list(item_ids.values())
    times = pa.list_(pa.timestamp("us", tz="UTC"))
    return pa.table(
        {
            "user_id": list(item_ids),
            "segment": ["new", *[None] * (len(lists) - 1)],
            "item_ids": lists,
            "event_types": [["view"] * len(items) for items in lists],
            "timestamps": pa.array([[n * 1_000_000 for n in range(len(i))] for i in lists], times),
            "devices": [["app"] * len(items) for items in lists],
        }
    )


def make(**item_ids):
    return TokenStore.from_sequences(make_sequences(**item_ids), CATALOGUE, ENCODER)


def equal(one, other):
    names = ("offsets_U", "items_T", "context_TF", "timestamps_T")
    return one.user_ids.equals(other.user_ids) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in names
    )


def test_a_column_of_the_shop_is_a_context_field():
    config = ContextConfig(categorical=("region",), time=())
    encoder = ContextEncoder.learn(config, {"region": {"north": 2, "south": 1}})
    sequences = make_sequences(u=["a", "x", "b"])
    sequences = sequences.append_column("region", pa.array([["south", "north", None]]))
    store = TokenStore.from_sequences(sequences, CATALOGUE, encoder)
    assert store.context_TF.tolist() == [[2], [0]]


def test_users_follow_each_other_in_one_array():
    store = make(u=["a", "b"], v=["c"])
    assert store.offsets_U.tolist() == [0, 2, 3]
    assert store.items_T.tolist() == [2, 3, 4]
    assert (store.num_users, store.num_tokens) == (2, 3)


def test_unknown_items_are_left_out_with_their_context():
    store = make(u=["a", "x", "b"], v=["x"], w=["c"])
    assert store.offsets_U.tolist() == [0, 2, 2, 3]
    assert store.timestamps_T.tolist() == [0, 2_000_000, 0]


def test_context_is_that_of_each_event_and_its_user():
    # Codes of device, segment and gap: app is 1, new is 1, a gap of one second is 1 + log2(2).
    store = make(u=["a", "b"], v=["c"])
    assert store.context_TF.tolist() == [[1, 1, 0], [1, 1, 2], [1, 0, 0]]


def test_the_gap_of_a_user_does_not_reach_into_the_one_before():
    assert previous_times(np.array([5, 6, 7]), np.array([0, 2, 3])).tolist() == [
        NO_TIME,
        5,
        NO_TIME,
    ]


@pytest.mark.parametrize("offsets", [[0, 0, 3], [0, 3, 3], [0, 0, 3, 3, 3]])
def test_users_without_events_disturb_nobody(offsets):
    assert previous_times(np.array([5, 6, 7]), np.array(offsets)).tolist() == [NO_TIME, 5, 6]


def test_concatenated_parts_are_the_whole():
    parts = [make(u=["a", "b"], v=["c"]), make(w=["b"])]
    joined = TokenStore.concatenate(parts)
    assert joined.offsets_U.tolist() == [0, 2, 3, 4]
    assert joined.user_ids.to_pylist() == ["u", "v", "w"]


def test_arrow_and_back_is_the_same():
    store = make(u=["a", "x", "b"], v=["x"], w=["c"])
    assert equal(TokenStore.from_arrow(store.to_arrow(), 3), store)


def test_a_slice_of_a_table_is_read_as_it_stands():
    sequences = make_sequences(u=["a", "b"], v=["c"], w=["b", "a"])
    sliced = TokenStore.from_sequences(sequences.slice(1, 2), CATALOGUE, ENCODER)
    assert sliced.items_T.tolist() == [4, 3, 2]
    assert sliced.offsets_U.tolist() == [0, 1, 3]

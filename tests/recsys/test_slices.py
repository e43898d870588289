"""NDCG of kinds of users and requests."""

from math import log2

import numpy as np
import pytest

from recsys.slices import slice_labels, slice_ndcg


def test_targets_are_labelled_by_history_item_segment_and_device(shop):
    store = shop.store
    users_N = np.array([0, 1])
    targets_N = store.offsets_U[users_N] + [4, 5]
    counts_I = np.full(shop.catalogue.num_rows, 12)
    labels = slice_labels(store, users_N, targets_N, counts_I, shop.context)
    assert labels["history_length"].tolist() == ["1-4", "5-9"]
    assert labels["item_training_events"].tolist() == ["10-99", "10-99"]
    assert set(labels["segment"]) <= {"new", "loyal", "unknown"}
    assert set(labels["device"]) <= {"mobile", "desktop", "unknown"}


@pytest.mark.parametrize(("events", "label"), [(0, "0"), (1, "1-9"), (9, "1-9"), (1000, "1000+")])
def test_cold_items_have_a_label_of_their_own(shop, events, label):
    counts_I = np.full(shop.catalogue.num_rows, events)
    users_N = np.array([0])
    targets_N = shop.store.offsets_U[users_N] + 1
    labels = slice_labels(shop.store, users_N, targets_N, counts_I, shop.context)
    assert labels["item_training_events"].tolist() == [label]


def test_each_label_has_its_own_mean():
    labels = {"segment": np.array(["x", "y", "x"], object)}
    found = slice_ndcg(np.array([1, 99, 2]), labels)["segment"]
    assert found["x"]["num_users"] == 2
    assert found["x"]["mean"] == pytest.approx((1 + 1 / log2(3)) / 2)
    assert found["y"]["mean"] == 0

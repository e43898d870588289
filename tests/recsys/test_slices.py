"""NDCG of kinds of users and requests."""

import dataclasses
from math import log2

import numpy as np
import pytest

from recsys.context import NO_TIME, ContextConfig, ContextEncoder
from recsys.slices import Slicing, slice_ndcg, slice_targets


@pytest.fixture
def labels_of(shop):
    """Labels of targets of the shop, a list a slicing."""

    def label(users, places, counts_I=None, store=shop.store, context=shop.context):
        users_N = np.array(users)
        targets_N = store.offsets_U[users_N] + places
        if counts_I is None:
            counts_I = np.full(shop.catalogue.num_rows, 12)
        found = slice_targets(store, users_N, targets_N, counts_I, context)
        return {
            title: [slicing.names[code] for code in slicing.codes_N]
            for title, slicing in found.items()
        }

    return label


def test_targets_are_labelled_by_what_was_known_of_the_request(labels_of):
    labels = labels_of([0, 1], [4, 5])
    assert labels["history_length"] == ["1-4", "5-9"]
    assert labels["item_training_events"] == ["10-99", "10-99"]
    assert set(labels["segment"]) <= {"new", "loyal", "unknown"}
    assert set(labels["device"]) <= {"mobile", "desktop", "unknown"}
    assert set(labels["event_type"]) <= {"view", "purchase"}


@pytest.mark.parametrize(("events", "label"), [(0, "0"), (1, "1-9"), (9, "1-9"), (1000, "1000+")])
def test_cold_items_have_a_label_of_their_own(shop, labels_of, events, label):
    counts_I = np.full(shop.catalogue.num_rows, events)
    assert labels_of([0], [1], counts_I)["item_training_events"] == [label]


@pytest.mark.parametrize("time", [("hour", "weekday"), ()], ids=["read", "not read"])
def test_hour_and_weekday_are_those_of_the_shop(make_store, labels_of, time):
    # Ten days after Thursday, 1 January 1970, at 23:00 in UTC: a Monday in Berlin.
    store = make_store([[0, 1]], days=[[0, 10]])
    timestamps_T = store.timestamps_T + 23 * 3_600_000_000
    config = ContextConfig(categorical=(), time=time, timezone="Europe/Berlin")
    context = ContextEncoder.learn(config, {})
    codes_TF = context.encode(timestamps_T, timestamps_T, {})
    store = dataclasses.replace(store, timestamps_T=timestamps_T, context_TF=codes_TF)
    labels = labels_of([0], [1], store=store, context=context)
    assert labels["hour"] == ["00"]
    assert labels["weekday"] == ["Monday"]


def test_hours_and_weekdays_are_those_that_the_model_reads(shop):
    store, context = shop.store, shop.context
    users_N = np.arange(store.num_users)
    targets_N = store.offsets_U[1:] - 1
    counts_I = np.zeros(shop.catalogue.num_rows, int)
    found = slice_targets(store, users_N, targets_N, counts_I, context)
    for name in ("hour", "weekday"):
        read_N = store.context_TF[targets_N, context.fields.index(name)]
        assert (found[name].codes_N == read_N - 1).all()


def test_a_run_without_context_has_every_slicing_but_those_of_its_fields(shop, labels_of):
    context = ContextEncoder.learn(ContextConfig(categorical=(), time=()), {})
    store = dataclasses.replace(shop.store, context_TF=shop.store.context_TF[:, :0])
    found = labels_of([0, 1], [2, 2], store=store, context=context)
    reader = labels_of([0, 1], [2, 2])
    assert found == {
        title: labels
        for title, labels in reader.items()
        if title not in ("device", "segment", "event_type")
    }


def test_a_target_without_a_time_is_of_an_unknown_hour(make_store, labels_of):
    context = ContextEncoder.learn(ContextConfig(categorical=(), time=()), {})
    store = make_store([[0, 1], [0, 1]], days=[[0, 0], [0, 0]])
    store.timestamps_T[1] = NO_TIME
    labels = labels_of([0, 1], [1, 1], store=store, context=context)
    assert labels["hour"] == ["unknown", "00"]
    store.timestamps_T[:] = NO_TIME
    labels = labels_of([0, 1], [1, 1], store=store, context=context)
    assert set(labels) == {"history_length", "item_training_events"}


@pytest.mark.parametrize(
    ("seconds", "label"),
    [(0, "under 1 min"), (60, "1-10 min"), (3600, "1-24 h"), (7 * 86_400, "over 7 days")],
)
def test_pauses_are_measured_exactly(make_store, labels_of, seconds, label):
    store = make_store([[0, 1]], days=[[0, seconds / 86_400]])
    store = dataclasses.replace(store, timestamps_T=np.array([0, seconds * 1_000_000]))
    context = ContextEncoder.learn(ContextConfig(categorical=(), time=()), {})
    assert labels_of([0], [1], store=store, context=context)["time_since_last_event"] == [label]


def test_unknown_values_share_the_label_of_a_value_unknown(shop, labels_of):
    counts = {"device": {"unknown": 3, "mobile": 2}}
    context = ContextEncoder.learn(ContextConfig(categorical=("device",), time=()), counts)
    codes_TF = np.resize(np.array([0, 1, 2], np.uint8), (shop.store.num_tokens, 1))
    store = dataclasses.replace(shop.store, context_TF=codes_TF)
    labels = labels_of([0, 0, 0], [1, 2, 3], store=store, context=context)["device"]
    assert sorted(labels) == ["mobile", "unknown", "unknown"]


def test_each_part_has_its_own_mean():
    slicing = Slicing(("x", "y"), np.array([0, 1, 0]))
    found = slice_ndcg(np.array([1, 99, 2]), {"segment": slicing})["segment"]
    assert found["x"]["num_users"] == 2
    assert found["x"]["mean"] == pytest.approx((1 + 1 / log2(3)) / 2)
    assert found["y"]["mean"] == 0


def test_parts_come_in_the_order_of_their_names_and_empty_ones_not():
    slicing = Slicing(("early", "noon", "late"), np.array([2, 0, 2]))
    found = slice_ndcg(np.array([1, 1, 1]), {"hour": slicing})
    assert list(found["hour"]) == ["early", "late"]

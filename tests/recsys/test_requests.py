"""Requests of all users, beside what is made of each by itself."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from recsys.artifact import load_artifact
from recsys.catalogue import PAD
from recsys.context import NO_TIME, ContextConfig, ContextEncoder
from recsys.filters import ItemIndex
from recsys.queries import Event, Query, RequestContext, encode_queries
from recsys.ranker import Ranker
from recsys.requests import read_requests
from recsys.scorer import gather_histories
from tests.conftest import START_US

HOUR_US = 3_600_000_000
ASKED_US = START_US + 100 * HOUR_US
HISTORIES = [["i1", "i2", "i3"], ["gone"], [], [f"i{n}" for n in range(20)], ["i5", "gone", "i5"]]
SEGMENTS = ["loyal", None, "new", "unheard of", "new"]
KNOWN = np.array([0, 3, 4])
"""Who has an item that the catalogue knows."""


def make_users():
    lengths = [len(history) for history in HISTORIES]
    times = [[START_US + n * n * HOUR_US // 10 for n in range(length)] for length in lengths]
    return pa.table(
        {
            "user_id": [f"u{n}" for n in range(len(HISTORIES))],
            "segment": pa.array(SEGMENTS, pa.string()),
            "item_ids": pa.array(HISTORIES, pa.list_(pa.string())),
            "event_types": pa.array(
                [
                    ["view", "purchase", None, "view"][:length] + ["view"] * (length - 4)
                    for length in lengths
                ],
                pa.list_(pa.string()),
            ),
            "timestamps": pa.array(times, pa.list_(pa.timestamp("us", tz="UTC"))),
            "devices": pa.array([["mobile"] * length for length in lengths], pa.list_(pa.string())),
        }
    )


def make_queries():
    def query(row):
        times = [round(time.timestamp() * 1e6) for time in row["timestamps"]]
        events = zip(row["item_ids"], times, row["event_types"], row["devices"], strict=True)
        request = RequestContext(ASKED_US, segment=row["segment"])
        return Query(tuple(map(Event._make, events)), request, k=10)

    return [query(row) for row in make_users().to_pylist()]


def with_own_field(context):
    """A field of the shop's own, which requests alone tell."""
    names = (*context.config.categorical, "region")
    config = ContextConfig(categorical=names, time=context.config.time)
    return ContextEncoder(config, {**context.vocabularies, "region": ("north", "south")})


@pytest.mark.parametrize("has_own_field", [False, True])
@pytest.mark.parametrize("history_len", [2, 50])
def test_a_column_of_users_is_encoded_as_each_query_is(shop, history_len, has_own_field):
    context = with_own_field(shop.context) if has_own_field else shop.context
    store = read_requests(make_users(), shop.catalogue, context, ASKED_US)
    found = gather_histories(store, KNOWN, store.offsets_U[KNOWN + 1] - 1, history_len)

    index, queries = ItemIndex(shop.catalogue), make_queries()
    one_by_one = encode_queries([queries[u] for u in KNOWN], index, context, history_len)
    assert found.items_BL.tolist() == one_by_one.items_BL.tolist()
    assert found.context_BLF.tolist() == one_by_one.context_BLF.tolist()
    requests_BF = store.context_TF[store.offsets_U[KNOWN + 1] - 1]
    assert (requests_BF * context.known_at_request_F).tolist() == one_by_one.request_BF.tolist()
    # Times have an origin of their own in each batch.
    is_token_BL = one_by_one.items_BL != PAD
    ages_BL = (found.request_seconds_B[:, None] - found.seconds_BL).numpy()[is_token_BL]
    expected_BL = one_by_one.request_seconds_B[:, None] - one_by_one.seconds_BL
    assert ages_BL.tolist() == expected_BL[is_token_BL].tolist()


def test_who_has_no_known_item_has_the_request_alone(shop):
    store = read_requests(make_users(), shop.catalogue, shop.context, ASKED_US)
    assert np.diff(store.offsets_U).tolist() == [4, 1, 1, 21, 3]
    assert store.items_T[store.offsets_U[1:] - 1].tolist() == [PAD] * 5
    gap = shop.context.fields.index("gap")
    asked = store.offsets_U[1:] - 1
    assert (store.context_TF[asked, gap] == 0).tolist() == [False, True, True, False, False]
    assert NO_TIME not in store.timestamps_T


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("tokens", [1, 30, 10_000])
def test_users_get_the_lists_of_their_queries_however_few_are_encoded_at_once(
    shop, registry, monkeypatch, tokens, exclude_seen
):
    monkeypatch.setattr("recsys.ranker._TOKENS_OF_THREAD", tokens)
    ranker = Ranker(load_artifact(registry / "v1"), device="cpu")
    store = read_requests(make_users(), shop.catalogue, shop.context, ASKED_US)
    found = ranker.rank_users(store, KNOWN[::-1], 10, exclude_seen=exclude_seen)

    queries = [replace(make_queries()[u], exclude_seen=exclude_seen) for u in KNOWN[::-1]]
    for best, (alone,) in zip(found, ([*ranker.rank([query])] for query in queries), strict=True):
        assert tuple(shop.catalogue.decode(best.items).to_pylist()) == alone.item_ids
        np.testing.assert_allclose(best.scores, alone.scores, rtol=1e-5)

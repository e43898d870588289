from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.artifact import load_artifact, save_model
from recsys.catalogue import Catalogue
from recsys.errors import ArtifactError
from recsys.filters import AttributeFilter, FilterError, ItemIndex
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.queries import Event, Query, RequestContext
from recsys.ranker import Ranker, SimilarQuery
from recsys.scorer import ModelScorer


@pytest.fixture(scope="module")
def artifact(registry):
    return load_artifact(registry / "v1")


@pytest.fixture(scope="module")
def ranker(artifact):
    return Ranker(artifact, device="cpu")


def events(*numbers):
    return tuple(Event(f"i{number}") for number in numbers)


def query_of(shop, user, target):
    """What a shop would send just before the event at a position of the store."""
    store, context = shop.store, shop.context
    names = {name: ("", *context.vocabularies[name]) for name in context.config.categorical}

    def value(position, field):
        code = store.context_TF[position, context.fields.index(field)]
        return names[field][code] if code else None

    history = [
        Event(
            shop.catalogue.decode(store.items_T[[position]])[0].as_py(),
            int(store.timestamps_T[position]),
            value(position, "event_type"),
            value(position, "device"),
        )
        for position in range(store.offsets_U[user], target)
    ]
    request = RequestContext(
        int(store.timestamps_T[target]),
        device=value(target, "device"),
        segment=value(target, "segment"),
    )
    return Query(tuple(history), request, k=40, exclude_seen=False)


@pytest.mark.parametrize("kind", ["bidirectional", "causal", "coded"])
def test_ranker_and_evaluation_give_equal_scores(shop, artifact, coded_artifact, kind, tmp_path):
    if kind == "causal":
        artifact = causal(artifact, shop, tmp_path)
    if kind == "coded":
        artifact = coded_artifact
    model = artifact.load_model()
    users = np.arange(shop.store.num_users)
    targets = shop.store.offsets_U[1:] - 1
    scorer = ModelScorer(model, shop.context.known_at_request_F)
    expected_BI = scorer.score(shop.store, users, targets)

    ranked = Ranker(artifact, device="cpu").rank(
        [query_of(shop, user, target) for user, target in zip(users, targets, strict=True)]
    )

    for row, answer in zip(expected_BI, ranked, strict=True):
        items = shop.catalogue.encode(list(answer.item_ids))
        assert len(answer.item_ids) == 40
        np.testing.assert_allclose(answer.scores, row[items], atol=1e-5)


def causal(artifact, shop, tmp_path):
    torch.manual_seed(3)
    config = ModelConfig(attention="causal", dim=16, num_layers=1, num_heads=2, max_len=10)
    model = NextItemModel(config, shop.catalogue.num_rows, shop.context.sizes)
    torch.nn.init.normal_(model.request.table.weight)
    save_model(tmp_path, model, shop.catalogue, shop.context)
    return replace(artifact, path=tmp_path)


def test_a_batch_answers_as_single_queries_do(shop, ranker):
    queries = [
        Query(events(1, 2, 3), k=3),
        Query(events(4), RequestContext(timezone="Asia/Tokyo", timestamp_us=0), k=7),
        Query(events(*range(12)), k=5, exclude_items=("i20",)),
    ]

    together = ranker.rank(queries)
    alone = [ranker.rank([query])[0] for query in queries]

    assert [answer.item_ids for answer in together] == [answer.item_ids for answer in alone]
    assert [len(answer.item_ids) for answer in together] == [3, 7, 5]


def test_time_zone_of_the_request_changes_its_hour(ranker):
    at = RequestContext(timestamp_us=1_760_000_000_000_000)
    query = Query(events(1, 2), at)

    here, there = ranker.rank([query, replace(query, context=replace(at, timezone="Asia/Tokyo"))])

    assert here.scores != there.scores


def test_filters_leave_a_full_list_of_what_passes(ranker):
    wanted = AttributeFilter(
        include_categories=frozenset({"c1", "c2"}),
        exclude_categories=frozenset({"c2"}),
        available_only=True,
        min_price=2.0,
        max_price=33.0,
    )
    # c1 holds 1, 5, 9, ..., 37; 5 and 25 are sold out, 1 is too cheap, 37 too dear.
    passing = {"i9", "i13", "i17", "i21", "i29", "i33"}

    (answer,) = ranker.rank(
        [Query(events(9), k=10, attributes=wanted, exclude_seen=False, exclude_items=("i13",))]
    )

    assert set(answer.item_ids) == passing - {"i13"}
    assert list(answer.scores) == sorted(answer.scores, reverse=True)


def test_seen_items_are_left_out_unless_asked_for(ranker):
    query = Query(events(*range(20)), k=40)

    filtered, unfiltered = ranker.rank([query, replace(query, exclude_seen=False)])

    assert set(filtered.item_ids) == {f"i{number}" for number in range(20, 40)}
    assert len(unfiltered.item_ids) == 40


def test_unknown_items_are_counted_and_skipped(ranker):
    known = Query(events(1, 2))
    mixed = Query((Event("nothing"), Event("i1"), Event(7), Event("i2")))

    expected, answer = ranker.rank([known, mixed])

    assert answer.unknown_items == 2
    assert answer.item_ids == expected.item_ids


def test_history_without_a_known_item_gives_an_empty_list(ranker):
    answers = ranker.rank([Query((Event("nothing"),)), Query(()), Query(events(1), k=2)])

    assert [len(answer.item_ids) for answer in answers] == [0, 0, 2]
    assert ranker.rank([]) == []


def test_unknown_context_values_are_no_error(ranker):
    context = RequestContext(device="fridge", segment="none", timestamp_us=None)

    (answer,) = ranker.rank([Query(events(1), context)])

    assert len(answer.item_ids) == 10


def test_similar_leaves_the_item_itself_out(ranker):
    wanted = AttributeFilter(include_categories=frozenset({"c1"}))

    answer, unknown = ranker.similar(
        [SimilarQuery("i1", k=40, attributes=wanted), SimilarQuery("nothing")]
    )

    assert set(answer.item_ids) == {f"i{number}" for number in range(5, 40, 4)}
    assert all(-1.0001 <= score <= 1.0001 for score in answer.scores)
    assert unknown.item_ids == ()
    assert unknown.unknown_items == 1


def test_filter_on_a_missing_attribute_names_it(artifact):
    table = artifact.catalogue.table.drop_columns(["price"])
    ranker = Ranker(replace(artifact, catalogue=replace(artifact.catalogue, table=table)))

    with pytest.raises(FilterError, match="The catalogue has no price, so it cannot be filtered"):
        ranker.rank([Query(events(1), attributes=AttributeFilter(min_price=1.0))])


def test_broken_weights_never_warm_up(artifact, monkeypatch):
    ranker = Ranker(artifact, device="cpu")
    with torch.no_grad():
        ranker._model.norm.weight.fill_(float("nan"))

    with pytest.raises(ArtifactError, match="Version v1 gives scores that are not numbers"):
        ranker.warm_up()


def test_integer_ids_may_come_as_strings():
    index = ItemIndex(Catalogue.build(pa.array([10, 20]), np.array([1, 2]), None))

    assert index.encode([10, "20", "x", 30, ""]).tolist() == [2, 3, 0, 0, 0]
    assert index.decode(index.by_count) == [20, 10]


@pytest.mark.parametrize("category", range(4))
def test_an_item_that_nobody_has_touched_is_recommended(fashion, fashion_artifact, category):
    history = tuple(Event(number) for number in range(category, 32, 4))

    (answer,) = Ranker(fashion_artifact, device="cpu").rank([Query(history, k=3)])

    # Eight of the ten items of the category are seen; the ninth is warm and 36 to 39 are cold.
    assert set(answer.item_ids[:2]) == {32 + category, 36 + category}


def test_a_history_of_nothing_but_a_cold_item_is_understood(fashion_artifact):
    ranker = Ranker(fashion_artifact, device="cpu")

    (answer,) = ranker.rank([Query((Event(37),), k=5)])

    assert {item_id % 4 for item_id in answer.item_ids} == {1}
    (similar,) = ranker.similar([SimilarQuery(37, k=5)])
    assert {item_id % 4 for item_id in similar.item_ids} == {1}


def test_similar_items_by_codes_are_those_of_the_whole_table(coded_artifact):
    (answer,) = Ranker(coded_artifact, device="cpu").similar([SimilarQuery("i3", k=40)])

    model, catalogue = coded_artifact.load_model(), coded_artifact.catalogue
    table = model.output_table_ID.detach()
    items = torch.from_numpy(catalogue.encode(["i3", *answer.item_ids]))
    cosines = torch.cosine_similarity(table[items[:1]], table[items[1:]])
    assert len(answer.item_ids) == 39
    np.testing.assert_allclose(answer.scores, cosines, atol=1e-6)
    assert list(answer.scores) == sorted(answer.scores, reverse=True)

"""Weights over a vocabulary that has grown: rows stay with what they stand for."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.artifact import load_artifact, publish, save_model
from recsys.attributes import NO_ATTRIBUTES, AttributeEncoder, AttributesConfig
from recsys.catalogue import NUM_SPECIAL, PAD, Catalogue
from recsys.context import ContextConfig, ContextEncoder
from recsys.errors import ArtifactError
from recsys.fallback import write_fallback
from recsys.growth import (
    grow_weights,
    match_attributes,
    match_context,
    refuse_other_architecture,
)
from recsys.item_table import ItemFeatures
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.splits import leave_one_out
from tests.conftest import make_shop

_CATEGORY = AttributesConfig(categorical=("category",))
_NONE = AttributesConfig()
_SHAPES = [
    {"attention": "bidirectional"},
    {"attention": "causal", "separate_output": True, "relative_bias": True},
]


@pytest.fixture(scope="module")
def make_artifact(tmp_path_factory):
    """Publishes a shop's model with random weights; item `i3` is untrained, and the biases of a
    `popular` category are high.
    """

    def make(*, attributes=_NONE, without=(), popular=None, **changes):
        shop = make_shop()
        table = shop.catalogue.table.drop_columns(list(without))
        counts = table["count"].to_numpy().copy()
        counts[shop.catalogue.item_ids.index("i3").as_py()] = 0
        catalogue = Catalogue(table.set_column(1, "count", pa.array(counts)))
        encoder = AttributeEncoder.learn(attributes, catalogue)
        config = ModelConfig(**{"dim": 16, "num_layers": 1, "max_len": 10} | changes)
        torch.manual_seed(0)
        features = ItemFeatures.build(catalogue, encoder)
        model = NextItemModel(config, catalogue.num_rows, shop.context.sizes, features)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.5)
            if popular is not None:
                rows = (
                    np.flatnonzero(np.array(catalogue.column("category")) == popular) + NUM_SPECIAL
                )
                model.item_bias[rows] += 8

        def write(folder):
            save_model(folder, model, catalogue, shop.context, encoder)
            split = leave_one_out(shop.store.offsets_U)
            write_fallback(folder / "fallback", shop.store, split, catalogue, shop.context)

        return load_artifact(publish(tmp_path_factory.mktemp("registry"), "v1", write, {}))

    return make


def grow_catalogue(catalogue, new=(), gone=()):
    """`new` are (id, category) pairs; ids sort among the old ones."""
    kept = catalogue.table.filter(
        pa.array([item_id not in gone for item_id in catalogue.item_ids.to_pylist()])
    )
    rows = [
        {name: None for name in kept.column_names}
        | {"item_id": item_id, "count": 5}
        | ({"category": category} if "category" in kept.column_names else {})
        for item_id, category in new
    ]
    table = pa.concat_tables([kept, pa.Table.from_pylist(rows, kept.schema)])
    return Catalogue(table.sort_by("item_id"))


def grow_model(artifact, catalogue, context=None, attributes=None, seed=0):
    context, attributes = context or artifact.context, attributes or artifact.attributes
    features = ItemFeatures.build(catalogue, attributes)
    config = ModelConfig.model_validate(artifact.config["model"])
    model = NextItemModel(config, catalogue.num_rows, context.sizes, features)
    model.load_state_dict(grow_weights(artifact, catalogue, context, attributes, seed=seed))
    return model.eval()


def score(model, catalogue, histories):
    """Scores of the ids in `histories`, lists of one length, by the ids of the catalogue."""
    items_BL = torch.stack([torch.from_numpy(catalogue.encode(ids)).long() for ids in histories])
    B, L = items_BL.shape
    codes_BLF = torch.ones(B, L, 6, dtype=torch.int64)
    seconds_BL2 = torch.zeros(B, L, 2, dtype=torch.int32)
    with torch.no_grad():
        return model.scores(model(items_BL, codes_BLF, codes_BLF, seconds_BL2)[:, -1])


def row(catalogue, item_id):
    return int(catalogue.encode([item_id])[0])


NEW = (("a0", "c0"), ("i05", "c1"), ("i999", "c2"))
GONE = ("i7", "i38")


@pytest.mark.parametrize("changes", _SHAPES)
def test_rows_follow_their_ids_when_items_come_and_go(make_artifact, changes):
    artifact = make_artifact(**changes)
    before = artifact.load_model()
    catalogue = grow_catalogue(artifact.catalogue, NEW, GONE)
    after = grow_model(artifact, catalogue)

    for item_id in ("i0", "i10", "i39"):
        old, new = row(artifact.catalogue, item_id), row(catalogue, item_id)
        assert old != new
        assert torch.equal(before.items.weight[old], after.items.weight[new])
        assert before.item_bias[old] == after.item_bias[new]
        if before.outputs is not None:
            assert torch.equal(before.outputs.weight[old], after.outputs.weight[new])
    assert row(catalogue, "i7") == PAD
    assert torch.equal(before.items.weight[:NUM_SPECIAL], after.items.weight[:NUM_SPECIAL])


@pytest.mark.parametrize("changes", _SHAPES)
def test_old_items_score_as_before_for_old_histories(make_artifact, changes):
    artifact = make_artifact(**changes)
    catalogue = grow_catalogue(artifact.catalogue, NEW, GONE)
    rng = np.random.default_rng(0)
    old_ids = [f"i{n}" for n in range(40) if f"i{n}" not in (*GONE, "i3")]
    histories = rng.choice(old_ids, (20, 8)).tolist()

    before = score(artifact.load_model(), artifact.catalogue, histories)
    after = score(grow_model(artifact, catalogue), catalogue, histories)
    before = before[:, artifact.catalogue.encode(old_ids)]
    after = after[:, catalogue.encode(old_ids)]
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    assert torch.equal(after.argsort(dim=1), before.argsort(dim=1))


def test_an_unchanged_vocabulary_gives_the_weights_back(make_artifact):
    for attributes in (_NONE, _CATEGORY):
        artifact = make_artifact(attributes=attributes)
        grown = grow_model(artifact, artifact.catalogue).state_dict()
        untrained = row(artifact.catalogue, "i3")
        for name, weights in artifact.load_model().state_dict().items():
            rows = torch.arange(len(weights))
            if name in ("items.weight", "item_bias"):
                rows = rows[rows != untrained]
            assert torch.equal(grown[name][rows], weights[rows]), name


def test_a_new_item_scores_like_the_mean_of_its_category(make_artifact):
    artifact = make_artifact()
    catalogue = grow_catalogue(artifact.catalogue, NEW)
    scores_B = score(grow_model(artifact, catalogue), catalogue, [["i1", "i2"]])[0]
    category = [f"i{n}" for n in range(0, 40, 4)]
    expected = scores_B[catalogue.encode(category)].mean()
    assert scores_B[row(catalogue, "a0")] == pytest.approx(float(expected), abs=0.2)


def test_a_new_item_of_a_popular_category_stands_above_one_that_nothing_is_known_of(make_artifact):
    artifact = make_artifact(popular="c0")
    catalogue = grow_catalogue(artifact.catalogue, [("a0", "c0"), ("a1", None)])
    scores_BI = score(grow_model(artifact, catalogue), catalogue, [["i1", "i2"], ["i4", "i9"]])
    known, unknown = row(catalogue, "a0"), row(catalogue, "a1")
    assert (scores_BI[:, known] > scores_BI[:, unknown] + 2).all()


def test_without_attributes_new_items_start_near_the_mean_of_all(make_artifact):
    artifact = make_artifact(without=("category", "price", "available"))
    catalogue = grow_catalogue(artifact.catalogue, [("a0", None), ("a1", None)])
    first, second = grow_model(artifact, catalogue).items.weight[catalogue.encode(["a0", "a1"])]
    trained = artifact.catalogue.counts_I > 0
    mean_D = artifact.load_model().items.weight[trained].mean(0)
    torch.testing.assert_close(first, mean_D, rtol=0, atol=0.03)  # five times the noise
    assert not torch.equal(first, second)


def test_the_same_seed_grows_the_same_weights(make_artifact):
    artifact = make_artifact()
    catalogue = grow_catalogue(artifact.catalogue, NEW)
    first, again, other = (grow_model(artifact, catalogue, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.items.weight, again.items.weight)
    assert not torch.equal(first.items.weight, other.items.weight)


@pytest.mark.parametrize("separate_output", [False, True])
def test_attributes_carry_new_items(make_artifact, separate_output):
    artifact = make_artifact(attributes=_CATEGORY, separate_output=separate_output)
    catalogue = grow_catalogue(artifact.catalogue, [*NEW, ("a1", "c0")])
    model = grow_model(artifact, catalogue)
    new = catalogue.encode(["a0", "i05", "i999", "i3"])
    assert not model.items.weight[new].any()
    assert not model.item_bias[new].any()

    # Items of one category, of which nothing else is known, are alike to the last bit.
    with torch.no_grad():
        vectors_ID, first, second = model.output_table_ID, *catalogue.encode(["a0", "a1"])
    assert torch.equal(vectors_ID[first], vectors_ID[second])
    assert vectors_ID[first].any()


def test_values_of_attributes_keep_their_vectors():
    config = AttributesConfig(categorical=("category", "brand"), bands=("price",))
    before = AttributeEncoder(
        config, {"category": ("a", "b"), "brand": ("x",)}, {"price": (10.0, 20.0)}
    )
    after = AttributeEncoder(
        config, {"category": ("c", "b"), "brand": ("y", "x")}, {"price": (1.0, 9.0, 30.0)}
    )
    # Before: category 0 1 2, brand 3 4, price 5 with bands 6 7 8; new values are unknown ones. The
    # middles 5 and 19.5 of the inner bands lie in the first and the second band.
    assert match_attributes(before, after).tolist() == [0, 0, 2, 3, 3, 4, 5, 6, 6, 7, 8]
    assert match_attributes(before, before).tolist() == list(range(9))
    assert match_attributes(NO_ATTRIBUTES, NO_ATTRIBUTES).tolist() == []


def test_bands_appear_and_disappear():
    config = AttributesConfig(bands=("price",))
    none, one = (AttributeEncoder(config, {}, {"price": edges}) for edges in ((), (5.0,)))
    assert match_attributes(none, one).tolist() == [0, 1, 1]
    assert match_attributes(one, none).tolist() == [0, 1]


def test_a_new_context_value_starts_as_the_unknown_one(make_artifact):
    artifact = make_artifact(attention="causal")
    devices = {"desktop": 3, "tv": 2, "mobile": 1}
    seen = {"device": devices, "segment": {"loyal": 1}, "event_type": {"view": 1, "purchase": 1}}
    context = ContextEncoder.learn(artifact.context.config, seen)
    # Before: device 0 mobile 1 desktop 2, segment 3 new 4 loyal 5, event_type 6 view 7 purchase 8.
    rows = match_context(artifact.context, context)
    assert rows[:9].tolist() == [0, 2, 0, 1, 3, 5, 6, 8, 7]
    assert rows[9:].tolist() == list(range(9, 9 + 25 + 8 + 32))

    before, after = artifact.load_model(), grow_model(artifact, artifact.catalogue, context)
    for name in ("context", "request"):
        tables = [getattr(model, name).table.weight for model in (before, after)]
        assert torch.equal(tables[1], tables[0][rows])


def test_without_context_there_is_nothing_to_match():
    none = ContextEncoder.learn(ContextConfig(categorical=(), time=()), {})
    assert match_context(none, none).tolist() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dim": 32, "num_layers": 2},
            r"model.dim is 16 there and 32 here, model.num_layers is 1 there and 2 here; configure",
        ),
        ({"max_len": 20}, r"Version v1 cannot be the start of this model: model.max_len is 10"),
        ({"block": "ligr"}, r"model.block is 'transformer' there and 'ligr' here"),
    ],
)
def test_another_architecture_is_refused_with_every_difference(make_artifact, changes, message):
    artifact = make_artifact()
    config = ModelConfig.model_validate(artifact.config["model"])
    same = artifact.context.config, artifact.attributes.config
    refuse_other_architecture(artifact, config, *same)
    with pytest.raises(ArtifactError, match=message):
        refuse_other_architecture(artifact, config.model_copy(update=changes), *same)


def test_other_fields_are_refused(make_artifact):
    artifact = make_artifact(attributes=_CATEGORY)
    config = ModelConfig.model_validate(artifact.config["model"])
    context = artifact.context.config.model_copy(update={"categorical": ("device",)})
    with pytest.raises(ArtifactError, match=r"context.categorical is \['device', 'segment', 'even"):
        refuse_other_architecture(artifact, config, context, _CATEGORY)
    with pytest.raises(ArtifactError, match=r"attributes.categorical is \['category'\] there and "):
        refuse_other_architecture(
            artifact, config, artifact.context.config, AttributesConfig(num_bands=5)
        )
    more_values = _CATEGORY.model_copy(update={"max_values": 5})
    refuse_other_architecture(artifact, config, artifact.context.config, more_values)


def test_a_catalogue_of_another_shop_is_refused(make_artifact):
    artifact = make_artifact()
    for ids, message in [
        (pa.array(["x1", "x2"]), r"it was trained on none of the 2 items of the sequences"),
        (pa.array([1, 2]), r"its item ids are string, those of the sequences int64"),
    ]:
        catalogue = Catalogue.build(ids, np.array([3, 4]), None)
        with pytest.raises(ArtifactError, match=message):
            grow_model(artifact, catalogue)


def test_codes_follow_their_items_and_new_items_are_coded_as_their_kind(make_artifact):
    artifact = make_artifact(item_codes={"length": 4, "num_values": 16})
    catalogue = grow_catalogue(artifact.catalogue, NEW, GONE)
    before, after = artifact.load_model(), grow_model(artifact, catalogue)
    histories = [["i1", "i2", "i4"], ["i20", "i9", "i30"]]
    old = [i for i in artifact.catalogue.item_ids.to_pylist() if i not in (*GONE, "i3")]
    scores = [
        score(model, known, histories)[:, known.encode(old)]
        for model, known in ((before, artifact.catalogue), (after, catalogue))
    ]
    torch.testing.assert_close(*scores)

    members = [
        item_id
        for item_id, category in zip(
            artifact.catalogue.item_ids.to_pylist(),
            artifact.catalogue.column("category").to_pylist(),
            strict=True,
        )
        if category == "c1" and item_id != "i3"
    ]
    mean = before.items.all()[artifact.catalogue.encode(members)].mean(0)
    parts_C1E, centroids_CVE = mean.view(4, 1, 4), after.items.centroids
    nearest = (parts_C1E - centroids_CVE).norm(dim=2).argmin(1)
    assert after.items.codes[row(catalogue, "i05")].tolist() == nearest.tolist()

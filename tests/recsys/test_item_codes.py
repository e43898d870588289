"""Codes of items: what they are learned from, and that a model learns with them."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError

from recsys import item_codes
from recsys.attributes import AttributesConfig
from recsys.catalogue import NUM_SPECIAL, Catalogue
from recsys.errors import CatalogueError
from recsys.interactions import training_counts, training_matrix
from recsys.item_codes import ItemCodesConfig, agree_on_codes, factor_items, learn_codes
from recsys.model import NextItemModel
from recsys.recipe import read_recipe
from recsys.splits import leave_one_out
from recsys.trainer import Trainer, TrainerConfig


def catalogue_of(store, split, num_items, **columns):
    item_ids = pa.array(range(num_items))
    counts_I = training_counts(store, split, num_items + NUM_SPECIAL)
    items = pa.table({"item_id": item_ids, **columns})
    return Catalogue.build(item_ids, counts_I[NUM_SPECIAL:], items)


def learn(store, split, num_items, *, seed=0, columns=None, **config):
    catalogue = catalogue_of(store, split, num_items, **(columns or {}))
    codes = ItemCodesConfig.model_validate(config)
    return learn_codes(codes, store, split, catalogue, seed=seed)[NUM_SPECIAL:]


@pytest.fixture
def shop_of(make_store, hold_out_last):
    """A store of random histories, most items seldom in them, and its split."""

    def make(num_items, num_users=200, seed=0):
        rng = np.random.default_rng(seed)
        store = make_store(
            (num_items * rng.random((num_users, 10)) ** 2).astype(int) % num_items  # a list a user
        )
        return store, hold_out_last(store)

    return make


def test_factors_are_those_that_can_be_worked_out_by_hand(make_store, hold_out_last):
    # Three users had items 0 and 1, two had 2 and 3: the pairs are the two factors, the larger one
    # first, and each item has its share 1 / sqrt(2). The last event, 4, is held out.
    store = make_store([[0, 1, 4]] * 3 + [[2, 3, 3, 4]] * 2)
    factors = factor_items(store, hold_out_last(store), 7, 2, np.random.default_rng(0))
    half = 1 / np.sqrt(2)
    expected = [[0, 0], [0, 0], [half, 0], [half, 0], [0, half], [0, half], [0, 0]]
    np.testing.assert_allclose(np.abs(factors), expected, atol=1e-6)


def test_items_that_the_same_users_wanted_share_their_codes(make_store, hold_out_last):
    store = make_store([[0, 1, 4]] * 3 + [[2, 3, 3, 4]] * 2)
    codes = learn(store, hold_out_last(store), 5, length=2, num_values=2)
    for column in codes[:4].T:
        assert column[0] == column[1] != column[2] == column[3]


def test_factors_are_the_strongest_of_the_whole_matrix(shop_of):
    store, split = shop_of(num_items=40, num_users=2000)
    factors = factor_items(store, split, 42, 2, np.random.default_rng(0))
    matrix = training_matrix(store, split, 42).toarray()
    _, strengths, _ = np.linalg.svd(matrix)
    found = np.linalg.norm(matrix @ factors, axis=0)
    np.testing.assert_allclose(found, strengths[:2], rtol=1e-2)


def test_users_are_read_block_by_block(shop_of, monkeypatch):
    store, split = shop_of(num_items=30)
    whole = factor_items(store, split, 32, 3, np.random.default_rng(0))
    monkeypatch.setattr(item_codes, "_EVENTS_PER_BLOCK", 50)
    blocks = factor_items(store, split, 32, 3, np.random.default_rng(0))
    np.testing.assert_allclose(blocks, whole, atol=1e-5)


@pytest.mark.parametrize("source", ["svd", "random"])
def test_bins_are_equally_filled(shop_of, source):
    store, split = shop_of(num_items=100, num_users=2000)
    codes = learn(store, split, 100, length=4, num_values=16, source=source)
    for column in codes.T:
        sizes = np.bincount(column, minlength=16)
        assert set(sizes) <= {6, 7}  # 100 / 16


@pytest.mark.parametrize("source", ["svd", "random"])
def test_codes_depend_on_the_seed_alone(shop_of, source):
    shop = *shop_of(num_items=50), 50
    first, again, other = (learn(*shop, seed=seed, source=source) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_held_out_events_change_no_code(shop_of):
    store, _ = shop_of(num_items=50)
    split = leave_one_out(store.offsets_U)
    items_T = store.items_T.copy()
    items_T[split.validation_U], items_T[split.test_U] = 7, 9
    leaky = replace(store, items_T=items_T)
    assert np.array_equal(learn(store, split, 50), learn(leaky, split, 50))


def test_an_item_without_an_event_takes_no_bin_from_the_others(make_store, hold_out_last):
    store = make_store([[0, 1, 2, 3, 0]] * 3 + [[2, 3, 0]] * 2)
    codes = learn(store, hold_out_last(store), 1000, length=2, num_values=4)
    for column in codes.T:
        assert sorted(column[:4]) == [0, 1, 2, 3]
        assert set(np.bincount(column[4:])) <= {248, 249, 250}  # 996 / 4, padding and mask beside


def test_a_catalogue_with_fewer_items_than_codes_has_codes_all_the_same(make_store, hold_out_last):
    store = make_store([[0, 1, 0], [1, 2, 0]])
    codes = learn(store, hold_out_last(store), 3, length=8)
    assert codes.shape == (3, 8)
    assert codes.dtype == np.uint8


def test_attributes_fill_the_first_codes(shop_of):
    store, split = shop_of(num_items=20, num_users=500)
    columns = {
        "brand": ["rare" if item == 3 else "often" for item in range(20)],
        "price": [None if item == 5 else float(item < 10) for item in range(20)],
        "tags": [["often"] + (["rare"] if item < 2 else []) for item in range(20)],
    }
    attributes = {"categorical": ["brand", "tags"], "bands": ["price"], "num_bands": 2}
    found = learn(
        store, split, 20, columns=columns, length=5, source="attributes", attributes=attributes
    )
    by_svd = learn(store, split, 20, length=2)

    assert found.shape == (20, 5)
    # 0 is unknown; then the most frequent value, or the lowest band, comes first.
    assert found[:6, 0].tolist() == [1, 1, 1, 2, 1, 1]
    assert found[:6, 1].tolist() == [2, 2, 1, 1, 1, 1]
    assert found[:6, 2].tolist() == [2, 2, 2, 2, 2, 0]
    assert np.array_equal(found[:, 3:], by_svd)


def test_values_beyond_those_of_a_code_are_unknown(shop_of):
    store, split = shop_of(num_items=20, num_users=500)
    brands = ["a"] * 10 + ["b"] * 6 + ["c"] * 4
    config = {"source": "attributes", "attributes": {"categorical": ["brand"]}}
    found = learn(store, split, 20, columns={"brand": brands}, length=1, num_values=3, **config)
    assert found[:, 0].tolist() == [1] * 10 + [2] * 6 + [0] * 4


def test_a_column_that_the_catalogue_lacks_is_refused(shop_of):
    store, split = shop_of(num_items=20)
    attributes = {"categorical": ["brand"]}
    with pytest.raises(CatalogueError, match="The catalogue has no column 'brand'"):
        learn(store, split, 20, source="attributes", attributes=attributes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_values": 257}, "less than or equal to 256"),
        ({"source": "attributes"}, "takes 1 to 8 attributes, as many as length, not 0"),
        (
            {"source": "attributes", "length": 1, "attributes": {"bands": ["price", "age"]}},
            "takes 1 to 1 attributes, as many as length, not 2; name them in item_codes.attributes",
        ),
        (
            {"attributes": AttributesConfig(bands=("price",))},
            "source 'svd' has no attributes; leave them out",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(config, message):
    with pytest.raises(ValidationError, match=message):
        ItemCodesConfig.model_validate(config)


def test_the_first_rank_learns_and_the_others_take_what_they_are_sent(shop_of, monkeypatch):
    store, split = shop_of(num_items=20)
    catalogue = catalogue_of(store, split, 20)
    data = ItemCodesConfig(length=2), store, split, catalogue
    expected = torch.from_numpy(learn_codes(*data, seed=3))
    sent = []

    def broadcast(codes, src):
        assert src == 0
        sent.append(codes.clone())
        codes.copy_(sent[0])

    def codes_of(rank):
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
        monkeypatch.setattr("torch.distributed.broadcast", broadcast)
        return agree_on_codes(*data, seed=3, device=torch.device("cpu"))

    assert torch.equal(agree_on_codes(*data, seed=3, device=torch.device("cpu")), expected)
    assert torch.equal(codes_of(rank=0), expected)
    monkeypatch.setattr(item_codes, "learn_codes", lambda *data, **more: pytest.fail("learned"))
    assert torch.equal(codes_of(rank=1), expected)


@pytest.mark.parametrize(
    ("recipe_name", "max_epochs", "loss"),
    [
        ("sasrec-ce", 25, {}),
        ("bert4rec", 40, {}),
        ("esasrec", 25, {}),
        ("gsasrec", 100, {"negatives": {"num": 5, "group_size": 11}}),
    ],
)
def test_a_certain_next_item_is_learned_with_shared_centroids(
    make_store, recipe_name, max_epochs, loss
):
    # Sixty users walk round a circle of 20 items; five items share each centroid.
    store = make_store([[(user + step) % 20 for step in range(12)] for user in range(60)])
    split = leave_one_out(store.offsets_U)
    codes = {"length": 8, "num_values": 4}
    sizes = {"dim": 32, "max_len": 12, "dropout": 0.1, "item_codes": codes}
    optimiser = {"learning_rate": 5e-3}
    recipe = read_recipe(
        recipe_name, {"batch_size": 16, "model": sizes, "loss": loss, "optimiser": optimiser}
    )
    torch.manual_seed(0)
    model = NextItemModel(recipe.model, 22, ())
    catalogue = catalogue_of(store, split, 20)
    config = recipe.model.item_codes
    model.load_codes(torch.from_numpy(learn_codes(config, store, split, catalogue, seed=0)))
    before = model.items.codes.clone()
    trainer = Trainer(
        recipe,
        TrainerConfig(precision="fp32", max_epochs=max_epochs, validate_every=max_epochs),
        model,
        store,
        split,
        np.zeros(0, bool),
        seed=0,
        device=torch.device("cpu"),
    )
    reports = [trainer.train_epoch() for _ in range(max_epochs)]

    assert reports[-1].loss < 0.8 * reports[0].loss
    # Ten items are left when those seen are out: at random NDCG@10 is 0.45.
    assert reports[-1].ndcg10 > 0.9
    assert torch.equal(model.items.codes, before)

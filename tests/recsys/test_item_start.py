"""Item vectors that begin where items stand side by side."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError

from recsys.catalogue import NUM_SPECIAL, Catalogue
from recsys.item_start import agree_on_vectors, prepare_items, spectral_vectors
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.recipe import Recipe, read_recipe
from recsys.splits import leave_one_out
from recsys.trainer import Trainer, TrainerConfig

NUM_ITEMS = 21
NUM_ROWS = NUM_ITEMS + NUM_SPECIAL
CPU = torch.device("cpu")
SIZES = {"dim": 16, "num_layers": 1, "num_heads": 2, "max_len": 8, "dropout": 0.0}


@pytest.fixture
def halves(make_store, hold_out_last):
    """A hundred users who each stay among ten items of two halves, and the split; nobody has the
    item 20."""
    rng = np.random.default_rng(0)
    store = make_store([(rng.permutation(10)[:6] + 10 * (user % 2)) for user in range(100)])
    return store, hold_out_last(store)


def directions_of(store, split, num_rows, dim, seed):
    return spectral_vectors(store, split, num_rows, dim, seed=seed, device=CPU).numpy()


def test_items_of_a_half_lie_together(halves):
    vectors_ID = directions_of(*halves, NUM_ROWS, 2, seed=0)[NUM_SPECIAL:]
    assert vectors_ID.dtype == np.float32
    cosines_II = vectors_ID[:20] @ vectors_ID[:20].T
    same_II = np.arange(20)[:, None] // 10 == np.arange(20) // 10
    assert cosines_II[same_II].min() > 0.99
    assert np.abs(cosines_II[~same_II]).max() < 0.2


def test_vectors_have_length_one_where_there_are_neighbours(halves):
    vectors_ID = directions_of(*halves, NUM_ROWS, 8, seed=0)
    lengths_I = np.linalg.norm(vectors_ID, axis=1)
    np.testing.assert_allclose(lengths_I[NUM_SPECIAL:-1], 1, rtol=1e-5)
    # Padding, mask, and the item that nobody has.
    assert not lengths_I[[0, 1, -1]].any()


def test_small_islands_do_not_take_the_directions(make_store, hold_out_last):
    # Two crowds, each a graph of its own with weak ties between its parts, and ten lonely pairs:
    # without regularisation each pair is as strong a component as a crowd.
    rng = np.random.default_rng(0)
    crowds = [rng.permutation(10)[:8] + 10 * (user % 2) for user in range(100)]
    pairs = [[20 + 2 * pair, 21 + 2 * pair, 0] for pair in range(10)]
    store = make_store([*crowds, *pairs])
    vectors_ID = directions_of(store, hold_out_last(store), 42, 2, seed=0)[NUM_SPECIAL:]
    cosines_II = vectors_ID[:20] @ vectors_ID[:20].T
    assert np.abs(cosines_II[:10, 10:]).max() < 0.1
    assert cosines_II[:10, :10].min() > 0.9


def test_held_out_events_are_not_read(make_store, hold_out_last):
    sequences = [[user % 10, (user + 1) % 10, (user + 2) % 10] for user in range(40)]
    one, other = (make_store([[*row, last] for row in sequences]) for last in (10, 11))
    found = [directions_of(s, hold_out_last(s), 14, 4, seed=0) for s in (one, other)]
    assert np.array_equal(*found)


def test_a_seed_gives_the_same_vectors(halves):
    first, again = (directions_of(*halves, NUM_ROWS, 8, seed=3) for _ in range(2))
    assert np.array_equal(first, again)


def test_a_small_catalogue_leaves_columns_empty(make_store, hold_out_last):
    store = make_store([[0, 1, 2], [1, 0, 2]])
    vectors_ID = directions_of(store, hold_out_last(store), 5, 8, seed=0)
    assert vectors_ID.shape == (5, 8)
    assert not vectors_ID[:, 5:].any()
    assert np.isfinite(vectors_ID).all()


def test_a_log_without_neighbours_starts_at_random(make_store, hold_out_last):
    store = make_store([[0, 1], [1, 0]])
    assert not directions_of(store, hold_out_last(store), 4, 8, seed=0).any()


@pytest.mark.parametrize("separate_output", [False, True])
def test_models_begin_with_the_vectors(halves, separate_output):
    torch.manual_seed(0)
    sizes = ModelConfig(**SIZES, separate_output=separate_output)
    model = NextItemModel(sizes, NUM_ROWS, ())
    before_ID = model.items.weight.detach().clone()
    recipe = read_recipe("sasrec-ce", {"item_start": "spectral", "model": SIZES})
    catalogue = Catalogue.build(pa.array(range(NUM_ITEMS)), np.zeros(NUM_ITEMS, np.int64), None)
    prepare_items(model, recipe, *halves, catalogue, seed=5, device=CPU)

    directions_ID = spectral_vectors(*halves, NUM_ROWS, 16, seed=5, device=CPU)
    assert torch.equal(directions_ID, agree_on_vectors(*halves, NUM_ROWS, 16, seed=5, device=CPU))
    for table_ID in {model.items.weight, model.output_table_ID}:
        found_ID = table_ID.detach()[NUM_SPECIAL:-1]
        length = found_ID.norm(dim=1)
        assert torch.allclose(found_ID / length[:, None], directions_ID[NUM_SPECIAL:-1], atol=1e-6)
        assert torch.allclose(length, torch.tensor(3 * 0.02 * 4.0), rtol=1e-5)
    for row in (0, 1, -1):
        assert torch.equal(model.items.weight[row], before_ID[row])


def test_without_it_items_begin_at_random(halves):
    torch.manual_seed(0)
    model = NextItemModel(ModelConfig(**SIZES), NUM_ROWS, ())
    before_ID = model.items.weight.detach().clone()
    catalogue = Catalogue.build(pa.array(range(NUM_ITEMS)), np.zeros(NUM_ITEMS, np.int64), None)
    prepare_items(model, read_recipe("sasrec-ce"), *halves, catalogue, seed=5, device=CPU)
    assert torch.equal(model.items.weight, before_ID)


def test_a_spectral_start_learns_a_sparse_log_sooner(make_store):
    """Who was seen beside whom is known before the first step."""
    rng = np.random.default_rng(0)
    groups = rng.permuted(np.arange(200).reshape(20, 10)[rng.integers(0, 20, 300)], axis=1)
    store = make_store(groups[:, :6])
    split = leave_one_out(store.offsets_U)
    catalogue = Catalogue.build(pa.array(range(200)), np.zeros(200, np.int64), None)
    reached = {}
    for start in ("random", "spectral"):
        recipe = read_recipe(
            "sasrec-ce", {"item_start": start, "batch_size": 32, "model": SIZES | {"dim": 32}}
        )
        torch.manual_seed(0)
        model = NextItemModel(recipe.model, 202, ())
        prepare_items(model, recipe, store, split, catalogue, seed=0, device=CPU)
        config = TrainerConfig(max_epochs=3, precision="fp32")
        trainer = Trainer(
            recipe, config, model, store, split, np.zeros(0, bool), seed=0, device=CPU
        )
        while not trainer.should_stop:
            trainer.train_epoch()
        reached[start] = trainer.best_ndcg10
    assert reached["spectral"] > 1.5 * reached["random"]


def test_items_of_codes_have_nothing_to_start():
    with pytest.raises(ValidationError, match="leave item_start out"):
        Recipe.model_validate(
            {"name": "x", "item_start": "spectral", "model": {"item_codes": {"length": 8}}}
        )

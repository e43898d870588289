"""Stores of a few events, written out in the test, and a shop with items that nobody touched."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.artifact import Artifact, load_artifact, publish, save_model
from recsys.attributes import AttributeEncoder, AttributesConfig
from recsys.catalogue import NUM_SPECIAL, Catalogue
from recsys.context import ContextConfig, ContextEncoder
from recsys.fallback import write_fallback
from recsys.item_codes import ItemCodesConfig
from recsys.item_table import ItemFeatures
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.recipe import read_recipe
from recsys.splits import Split, leave_one_out
from recsys.tokens import TokenStore
from recsys.trainer import Trainer, TrainerConfig
from tests.conftest import write_artifact


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


@dataclass(frozen=True)
class Fashion:
    """Item n of forty is in category `c<n mod 4>`; users stay in theirs, and the last item of each
    category, 36 to 39, is cold."""

    catalogue: Catalogue
    attributes: AttributeEncoder
    store: TokenStore
    train: Callable[..., NextItemModel]
    """A trained model by the name of its recipe and changes of its `[model]`."""


@pytest.fixture(scope="session")
def fashion():
    """The shop with the cold items."""
    rng = np.random.default_rng(0)
    items_T = np.concatenate([user % 4 + 4 * rng.permutation(9) for user in range(200)])
    offsets_U = np.arange(201) * 9
    store = TokenStore(
        pa.array(range(200)),
        offsets_U,
        (items_T + NUM_SPECIAL).astype(np.int32),
        np.zeros((len(items_T), 0), np.uint8),
        np.zeros(len(items_T), np.int64),
    )
    item_ids = pa.array(range(40))
    items = pa.table({"item_id": item_ids, "category": [f"c{n % 4}" for n in range(40)]})
    counts = np.bincount(items_T.reshape(200, 9)[:, :-2].ravel(), minlength=40)
    catalogue = Catalogue.build(item_ids, counts, items)
    attributes = AttributeEncoder.learn(AttributesConfig(categorical=("category",)), catalogue)

    def train(recipe_name="sasrec-ce", **changes):
        sizes = {"dim": 16, "num_layers": 1, "num_heads": 1, "max_len": 9, **changes}
        optimiser = {"learning_rate": 1e-2}
        recipe = read_recipe(
            recipe_name, {"batch_size": 32, "model": sizes, "optimiser": optimiser}
        )
        torch.manual_seed(0)
        features = ItemFeatures.build(catalogue, attributes)
        model = NextItemModel(recipe.model, catalogue.num_rows, (), features)
        trainer = Trainer(
            recipe,
            TrainerConfig(max_epochs=6, precision="fp32"),
            model,
            store,
            leave_one_out(offsets_U),
            np.zeros(0, bool),
            seed=0,
            device=torch.device("cpu"),
        )
        for _ in range(6):
            trainer.train_epoch()
        return model.eval()

    return Fashion(catalogue, attributes, store, train)


@pytest.fixture(scope="session")
def fashion_artifact(fashion, tmp_path_factory) -> Artifact:
    """A trained version, published."""
    context = ContextEncoder.learn(ContextConfig(categorical=(), time=()), {})

    def write(folder):
        save_model(folder, fashion.train(), fashion.catalogue, context, fashion.attributes)
        split = leave_one_out(fashion.store.offsets_U)
        write_fallback(folder / "fallback", fashion.store, split, fashion.catalogue, context)
        (folder / "metrics.json").write_text("{}")

    return load_artifact(publish(tmp_path_factory.mktemp("fashion"), "v1", write, {}))


@pytest.fixture(scope="session")
def coded_artifact(shop, tmp_path_factory) -> Artifact:
    """An untrained version whose items have four codes each, published."""
    codes = ItemCodesConfig(length=4, num_values=8)
    config = ModelConfig(dim=16, num_layers=1, num_heads=2, max_len=10, item_codes=codes)
    write = partial(write_artifact, shop=shop, config=config)
    return load_artifact(publish(tmp_path_factory.mktemp("coded"), "v1", write, {}))

"""What tests share: one small Ray cluster for the whole session, and a tiny shop with a registry of
published artifacts.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.artifact import publish, save_model
from recsys.catalogue import NUM_SPECIAL, Catalogue
from recsys.context import ContextConfig, ContextEncoder
from recsys.fallback import write_fallback
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.registry import promote
from recsys.splits import leave_one_out
from recsys.tokens import TokenStore

START_US = 1_760_000_000_000_000
"""9 October 2025."""


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with four logical CPUs; its workers keep the modules of this checkout."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    ray.init(num_cpus=4, include_dashboard=True, object_store_memory=512 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shop() -> "Shop":
    """Forty items `i0` to `i39` and thirty users, without any file."""
    return make_shop()


@pytest.fixture(scope="session")
def registry(shop: "Shop", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with the untrained versions v1 (it serves) and v2 of the shop's model."""
    root = tmp_path_factory.mktemp("registry")
    for version, seed in (("v1", 1), ("v2", 2)):
        publish(root, version, partial(write_artifact, shop=shop, seed=seed), {"seed": seed})
    promote(root, "v1")
    return root


@dataclass(frozen=True)
class Shop:
    catalogue: Catalogue
    context: ContextEncoder
    store: TokenStore


def make_shop(num_items: int = 40, num_users: int = 30, seed: int = 0) -> Shop:
    """Item `i<n>` is in category `c<n mod 4>`, costs n, and every fifth is sold out."""
    rng = np.random.default_rng(seed)
    item_ids = pa.array([f"i{n}" for n in range(num_items)])
    attributes = {
        "item_id": item_ids,
        "category": pa.array([f"c{n % 4}" for n in range(num_items)]),
        "price": pa.array(np.arange(num_items, dtype=float)),
        "available": pa.array([n % 5 != 0 for n in range(num_items)]),
    }
    counts = 1000 - np.arange(num_items)
    catalogue = Catalogue.build(item_ids, counts, pa.table(attributes))
    context = ContextEncoder.learn(
        ContextConfig(),
        {
            "device": {"mobile": 2, "desktop": 1},
            "segment": {"new": 2, "loyal": 1},
            "event_type": {"view": 2, "purchase": 1},
        },
    )
    lengths = rng.integers(3, 30, num_users)
    sequences = pa.table(
        {
            "user_id": [f"u{n}" for n in range(num_users)],
            "segment": rng.choice(["new", "loyal", "unseen"], num_users),
            "item_ids": [[f"i{n}" for n in rng.integers(0, num_items + 2, L)] for L in lengths],
            "event_types": [rng.choice(["view", "purchase"], L).tolist() for L in lengths],
            "devices": [rng.choice(["mobile", "desktop", "tv"], L).tolist() for L in lengths],
            "timestamps": pa.array(
                [
                    (START_US + rng.integers(1, 90_000_000_000, L).cumsum()).tolist()
                    for L in lengths
                ],
                pa.list_(pa.timestamp("us", tz="UTC")),
            ),
        }
    )
    return Shop(catalogue, context, TokenStore.from_sequences(sequences, catalogue, context))


def write_artifact(
    folder: Path, *, shop: Shop, seed: int = 0, config: ModelConfig | None = None
) -> None:
    """Everything but the evaluation's figures and the export."""
    torch.manual_seed(seed)
    config = config or ModelConfig(dim=16, num_layers=1, num_heads=2, max_len=10)
    model = NextItemModel(config, shop.catalogue.num_rows, shop.context.sizes)
    table = model.items
    with torch.no_grad():
        vectors = table.centroids if config.item_codes else table.weight[NUM_SPECIAL:]
        vectors.normal_()
        model.item_bias.normal_()
    save_model(folder, model, shop.catalogue, shop.context)
    split = leave_one_out(shop.store.offsets_U)
    write_fallback(folder / "fallback", shop.store, split, shop.catalogue, shop.context)
    (folder / "metrics.json").write_text("{}")

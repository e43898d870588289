"""A published version with random weights, to serve under load: what it recommends is noise, what
it costs is not.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.evaluation import Size, draw_store
from recsys.artifact import publish, save_model
from recsys.catalogue import NUM_SPECIAL, Catalogue
from recsys.context import ContextConfig, ContextEncoder
from recsys.encoders import Backend, Variant, make_encoder
from recsys.export import export_variant, parity
from recsys.fallback import write_fallback
from recsys.item_codes import ItemCodesConfig
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.registry import promote
from recsys.splits import leave_one_out

VERSION = "random"
_EVENTS = Size(users=1000, items=0, events=20)
"""What the rungs below the model are made of."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the production recipe of the case study unless said otherwise."""

    items: int = 3_416
    """ML-1M's films with training events."""
    dim: int = 256
    layers: int = 4
    heads: int = 8
    max_len: int = 50
    codes: int = 0
    """Bytes an item of a RecJPQ table; 0 for a vector of its own each."""

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            dim=self.dim,
            num_layers=self.layers,
            num_heads=self.heads,
            max_len=self.max_len,
            item_codes=ItemCodesConfig(length=self.codes, source="random") if self.codes else None,
        )

    def __str__(self) -> str:
        table = f"RecJPQ m = {self.codes}" if self.codes else "full fp32 table"
        return (
            f"{self.items:,} items, {table}, width {self.dim}, {self.layers} layers, "
            f"{self.heads} heads, {self.max_len} positions"
        )


def publish_random(registry: Path, shape: Shape, variants: Sequence[Variant] = ("fp32",)) -> Path:
    """Publishes and promotes a version; returns its folder.

    Args:
        variants: that it is exported in, fp32 the first. No gate is asked: nobody validates noise.
    """

    def write(folder: Path) -> None:
        _write(folder, shape, variants)

    folder = publish(registry, VERSION, write, {"seed": 0, "tables": {}})
    promote(registry, VERSION)
    return folder


def draw_bodies(shape: Shape, count: int, top_k: int) -> list[dict[str, Any]]:
    """Requests for histories of 5 to 49 events, a few items often and most seldom; no two alike."""
    rng = np.random.default_rng(11)
    lengths = rng.integers(5, shape.max_len, count)
    return [{"user_history": _draw_items(rng, shape, length), "top_k": top_k} for length in lengths]


def _draw_items(rng: np.random.Generator, shape: Shape, count: int) -> list[int]:
    items: list[int] = (shape.items * rng.random(count) ** 3).astype(int).tolist()
    return items


def _write(folder: Path, shape: Shape, variants: Sequence[Variant]) -> None:
    torch.manual_seed(0)
    # Zipf: the n-th item has an n-th of the events of the first.
    counts = np.maximum(1, 100_000 // np.arange(1, shape.items + 1))
    catalogue = Catalogue.build(pa.array(np.arange(shape.items)), counts, None)
    context = ContextEncoder.learn(
        ContextConfig(categorical=("device",)), {"device": {"mobile": 2, "desktop": 1}}
    )
    model = NextItemModel(shape.config, catalogue.num_rows, context.sizes).eval()
    save_model(folder, model, catalogue, context)
    _export(model, folder, variants)
    store = draw_store(Size(_EVENTS.users, shape.items, _EVENTS.events))
    assert store.items_T.max() < NUM_SPECIAL + shape.items
    split = leave_one_out(store.offsets_U)
    write_fallback(folder / "fallback", store, split, catalogue, context)
    (folder / "metrics.json").write_text("{}")


def _export(model: NextItemModel, folder: Path, variants: Sequence[Variant]) -> None:
    facts: dict[str, Any] = {}
    for variant in variants:
        backend: Backend = "onnx" if export_variant(model, variant, folder) else "torch"
        facts[variant] = {}
        if variant != "fp32":
            encode = make_encoder(model, folder, backend=backend, variant=variant, provider="cpu")
            facts[variant] = asdict(parity(model, encode))
    (folder / "export.json").write_text(json.dumps({"variants": facts}, indent=1))

"""What a GPU makes of a training, for `benchmarks.training`: how much of its arithmetic goes into
the model, and what a catalogue of two million items takes of its memory and time.

The time of ten million users is not measured but projected, see `Projection`. Without CUDA nothing
is measured, and the record says so.
"""

import gc
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.evaluation import Size, draw_store
from benchmarks.published import read_dataset
from recsys.catalogue import NUM_SPECIAL
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.recipe import Recipe, read_recipe
from recsys.splits import Split, leave_one_out
from recsys.tokens import TokenStore
from recsys.trainer import Trainer, TrainerConfig

EPOCHS = 3
PEAK_FLOPS: Mapping[str, float] = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10": 125e12,
}
"""Dense bf16 products a second by the data sheets, by the name that the driver gives."""
_SAMPLED = {"kind": "sampled-softmax", "negatives": {"source": "mixed", "num": 1_024}}
_GBCE = {"kind": "gbce", "negatives": {"source": "uniform", "num": 256, "group_size": 50}}
_TOUCHED = {"item_rows": "touched"}
RECIPE = "bert4rec-production"
EPOCH: dict[str, Any] = {"batch_size": 256, "model": {"num_heads": 4, "max_len": 200}}
LARGE: dict[str, dict[str, Any]] = {
    "full softmax": {},
    "sampled softmax": {"loss": _SAMPLED},
    "sampled softmax, touched rows": {"loss": _SAMPLED, "optimiser": _TOUCHED},
    "gBCE": {"loss": _GBCE},
    "gBCE, touched rows": {"loss": _GBCE, "optimiser": _TOUCHED},
}
LARGE_BATCH = 256
TWO_MILLION = Size(users=4_096, items=2_000_000, events=52)
"""Each user trains on 50 events, a whole window, and the two others are held out."""
NOT_MEASURED = {"is_measured": False, "reason": "PyTorch finds no CUDA device on this machine."}


@dataclass(frozen=True)
class Work:
    """What a model looks at in an epoch."""

    tokens: int
    pairs: int
    """Tokens times the tokens of their own window, which attention compares."""
    scored: float
    """Positions that are held against the whole catalogue."""


@dataclass(frozen=True)
class Projection:
    """How long a training of many users would take at a rate that was measured: the tokens of all
    users in an epoch, over tokens/s, times the epochs. One device; reading the data, validations
    and checkpoints are left out.

    Every user has one whole window, because it was measured with whole ones: windows of fewer
    events take fewer tokens, but a step over the whole table not much less time.
    """

    users: int = 10_000_000
    events: int = 50
    """Training events of a user."""
    epochs: int = 10

    def epoch_h(self, tokens_per_s: float) -> float:
        """Hours of one epoch."""
        return self.users * self.events / tokens_per_s / 3_600


def measure_gpu(dataset: str = "ml-1m.txt") -> dict[str, Any]:
    """All cases of the GPU, or that there is none."""
    if not torch.cuda.is_available():
        return NOT_MEASURED
    device = torch.device("cuda")
    return {
        "is_measured": True,
        "device": torch.cuda.get_device_name(),
        "epoch": measure_epoch(dataset, device, read_recipe(RECIPE, EPOCH)),
        "projection": asdict(Projection()),
        "large": {
            name: measure_large(TWO_MILLION, device, read_large(overrides))
            for name, overrides in LARGE.items()
        },
    }


def read_large(overrides: dict[str, Any]) -> Recipe:
    """The recipe of one way to learn among two million items."""
    return read_recipe(RECIPE, {"batch_size": LARGE_BATCH, **overrides})


def measure_epoch(dataset_name: str, device: torch.device, recipe: Recipe) -> dict[str, Any]:
    """Seconds of an epoch without its validation, and the share of the device's products that the
    model needed for its events, each counted once, although windows overlap a little.
    """
    dataset = read_dataset(dataset_name)
    trainer = make_trainer(
        recipe, dataset.store, dataset.split, dataset.catalogue.num_rows, device, EPOCHS
    )
    windows = trainer.steps_per_epoch * recipe.batch_size
    epochs = [trainer.train_epoch() for _ in range(EPOCHS)]
    seconds = median(windows / epoch.windows_per_s for epoch in epochs)
    lengths_U = dataset.split.train_end_U - dataset.store.offsets_U[:-1]
    work = count_work(lengths_U, recipe)
    flops_per_s = training_flops(recipe.model, dataset.catalogue.num_items, work) / seconds
    peak = _peak_flops(device)
    return {
        "recipe": recipe.name,
        "tokens_per_s": round(median(epoch.tokens_per_s for epoch in epochs)),
        "epoch_s": round(seconds, 2),
        "tflops_per_s": round(flops_per_s / 1e12, 2),
        "utilisation": round(flops_per_s / peak, 4) if peak else None,
    }


def measure_large(size: Size, device: torch.device, recipe: Recipe) -> dict[str, Any]:
    """The most that was allocated on the device, optimiser included, None without CUDA; tokens/s;
    and the hours that an epoch of ten million users would take.

    The first epoch counts for memory alone: it warms up.
    """
    store = draw_store(size)
    split = leave_one_out(store.offsets_U)
    # A model that was measured before would count as memory of this one.
    gc.collect()
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    # One epoch more than are trained, so that nothing is validated.
    trainer = make_trainer(recipe, store, split, size.items + NUM_SPECIAL, device, EPOCHS + 2)
    rate = median([trainer.train_epoch().tokens_per_s for _ in range(EPOCHS + 1)][1:])
    return {
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if is_cuda else None,
        "tokens_per_s": round(rate),
        "projected_epoch_h": round(Projection().epoch_h(rate), 2),
    }


def make_trainer(
    recipe: Recipe,
    store: TokenStore,
    split: Split,
    num_rows: int,
    device: torch.device,
    max_epochs: int,
    *,
    micro_batches: int = 1,
) -> Trainer:
    """A trainer of an untrained model, without context, which validates one user at the end."""
    torch.manual_seed(1)
    config = TrainerConfig(
        max_epochs=max_epochs,
        validate_every=max_epochs,
        validation_users=1,
        precision="auto",
        micro_batches=micro_batches,
    )
    model = NextItemModel(recipe.model, num_rows, ())
    known_F = np.zeros(0, bool)
    return Trainer(recipe, config, model, store, split, known_F, seed=1, device=device)


def count_work(lengths_U: np.ndarray, recipe: Recipe) -> Work:
    """The work of an epoch that reads each training event once, in windows as long as may be."""
    max_len = recipe.model.max_len
    whole_U, rest_U = np.divmod(lengths_U, max_len)
    tokens = int(lengths_U.sum())
    is_masked = recipe.objective.kind == "masked-item"
    scored = tokens * recipe.objective.mask_prob if is_masked else float(tokens)
    return Work(tokens, int((whole_U * max_len**2 + rest_U**2).sum()), scored)


def training_flops(config: ModelConfig, num_items: int, work: Work) -> float:
    """Multiplications and additions of the products of an epoch; the backward pass counts twice as
    much as the forward one, and what is computed again or for padding does not count. What follows
    attention in the last block is computed for scored positions alone.
    """
    square = 2 * config.dim**2
    attended = config.num_layers * (3 * square * work.tokens + 2 * 2 * config.dim * work.pairs)
    followed = 9 * square * ((config.num_layers - 1) * work.tokens + work.scored)
    softmax = 2 * config.dim * num_items * work.scored
    return 3.0 * (attended + followed + softmax)


def _peak_flops(device: torch.device) -> float | None:
    """None where the device is not among those that are known."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

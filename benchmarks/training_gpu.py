"""What a GPU makes of a training, for `benchmarks.training`: how much of its arithmetic goes into
the model, and what a catalogue of two million items takes of its memory.

Without CUDA nothing is measured, and the record says so.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
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
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}
"""Dense bf16 products a second by the data sheets, the longer name first."""
_SAMPLED = {"kind": "sampled-softmax", "negatives": {"source": "mixed", "num": 1_024}}
RECIPE = "bert4rec-production"
EPOCH: dict[str, Any] = {"batch_size": 256, "model": {"num_heads": 4, "max_len": 200}}
MEMORY: dict[str, dict[str, Any]] = {
    "full softmax": {"batch_size": 256},
    "sampled softmax": {"batch_size": 256, "loss": _SAMPLED},
}
TWO_MILLION = Size(users=1_024, items=2_000_000, events=52)
NOT_MEASURED = {"is_measured": False, "reason": "PyTorch finds no CUDA device on this machine."}


@dataclass(frozen=True)
class Work:
    """What a model looks at in an epoch."""

    tokens: int
    pairs: int
    """Tokens times the tokens of their own window, which attention compares."""
    scored: float
    """Positions that are held against the whole catalogue."""


def measure_gpu(dataset: str = "ml-1m.txt") -> dict[str, Any]:
    """All cases of the GPU, or that there is none."""
    if not torch.cuda.is_available():
        return NOT_MEASURED
    device = torch.device("cuda")
    return {
        "is_measured": True,
        "device": torch.cuda.get_device_name(),
        "epoch": measure_epoch(dataset, device, read_recipe(RECIPE, EPOCH)),
        "memory": {
            name: measure_memory(TWO_MILLION, device, read_recipe(RECIPE, overrides))
            for name, overrides in MEMORY.items()
        },
    }


def measure_epoch(dataset_name: str, device: torch.device, recipe: Recipe) -> dict[str, Any]:
    """Seconds of an epoch, and the share of the device's products that the model needed."""
    dataset = read_dataset(dataset_name)
    trainer = make_trainer(
        recipe, dataset.store, dataset.split, dataset.catalogue.num_rows, device, EPOCHS
    )
    rates = [trainer.train_epoch().tokens_per_s for _ in range(EPOCHS)]
    lengths_U = dataset.split.train_end_U - dataset.store.offsets_U[:-1]
    work = count_work(lengths_U, recipe)
    seconds = work.tokens / median(rates)
    flops_per_s = training_flops(recipe.model, dataset.catalogue.num_items, work) / seconds
    peak = _peak_flops(device)
    return {
        "recipe": recipe.name,
        "tokens_per_s": round(median(rates)),
        "epoch_s": round(seconds, 2),
        "tflops_per_s": round(flops_per_s / 1e12, 2),
        "utilisation": round(flops_per_s / peak, 4) if peak else None,
    }


def measure_memory(size: Size, device: torch.device, recipe: Recipe) -> dict[str, Any]:
    """The most that was allocated on the device during a few steps, optimiser included."""
    store = draw_store(size)
    split = leave_one_out(store.offsets_U)
    trainer = make_trainer(recipe, store, split, size.items + NUM_SPECIAL, device, max_epochs=2)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    trainer.train_epoch()
    seconds = time.perf_counter() - started
    peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"peak_gib": round(peak_bytes / 2**30, 2), "seconds": round(seconds, 2)}


def make_trainer(
    recipe: Recipe,
    store: TokenStore,
    split: Split,
    num_rows: int,
    device: torch.device,
    max_epochs: int,
) -> Trainer:
    """A trainer of an untrained model, without context, which validates one user at the end."""
    torch.manual_seed(1)
    config = TrainerConfig(
        max_epochs=max_epochs, validate_every=max_epochs, validation_users=1, precision="auto"
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
    much as the forward one, and what is computed again or for padding does not count.
    """
    linear = 2 * 12 * config.dim**2 * work.tokens
    attention = 2 * 2 * config.dim * work.pairs
    softmax = 2 * config.dim * num_items * work.scored
    return 3.0 * (config.num_layers * (linear + attention) + softmax)


def _peak_flops(device: torch.device) -> float | None:
    """None where the device is not among those that are known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)

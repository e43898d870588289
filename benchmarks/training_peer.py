"""RecTools trains a case of `benchmarks.training`; runs in an environment of its own, where nothing
of ours can be imported.

    python -I training_peer.py settings.json events.npz lists.npz

Reads the training events and the users to recommend for, writes the lists of these users, and
prints what the epochs took as one JSON object.
"""

import json
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import BERT4RecModel, SASRecModel
from rectools.models.nn.transformers.base import TransformerModelBase
from rectools.models.nn.transformers.net_blocks import PreLNTransformerLayers

MODELS = {"BERT4RecModel": BERT4RecModel, "SASRecModel": SASRecModel}
VERSIONS = ("rectools", "pytorch-lightning", "torch")


class EpochClock(Callback):
    """Seconds of each epoch of training; set-up is before and validation, were there any, after."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def make_trainer(epochs: int) -> Trainer:
    """On the CPU in fp32, as RecTools trains by itself, and silent."""
    return Trainer(
        max_epochs=epochs,
        min_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[EpochClock()],
    )


def make_model(settings: Mapping[str, Any]) -> TransformerModelBase:
    """The model as the settings name it."""
    blocks = {"pre-norm": {"transformer_layers_type": PreLNTransformerLayers}, "own": {}}
    return MODELS[settings["model"]](
        **settings["options"],
        **blocks[settings["block"]],
        get_trainer_func=make_trainer,
        get_trainer_func_kwargs={"epochs": settings["epochs"]},
        recommend_torch_device="cpu",
    )


def make_dataset(events: Mapping[str, np.ndarray]) -> Dataset:
    """Training events in their order: a second between any two, so that no order is left open."""
    frame = pd.DataFrame({Columns.User: events["users"], Columns.Item: events["items"]})
    frame[Columns.Weight] = 1.0
    frame[Columns.Datetime] = np.arange(len(frame)).astype("datetime64[s]")
    return Dataset.construct(frame)


def recommend(
    model: TransformerModelBase, dataset: Dataset, users_N: np.ndarray, k: int
) -> np.ndarray:
    """The first `k` items of each user that are not in the training events, int64 `[N, K]`; -1
    where there is none.
    """
    found = model.recommend(
        users_N, dataset, k=k, filter_viewed=True, on_unsupported_targets="ignore"
    )
    lists_NK = np.full((len(users_N), k), -1)
    rows = pd.Index(users_N).get_indexer(found[Columns.User])
    lists_NK[rows, found[Columns.Rank] - 1] = found[Columns.Item]
    return lists_NK


def main() -> None:
    """See the module."""
    _, settings_path, events_path, lists_path = sys.argv
    settings, events = json.loads(Path(settings_path).read_text()), np.load(events_path)
    torch.set_num_threads(settings["threads"])
    seed_everything(settings["seed"])
    dataset, model = make_dataset(events), make_model(settings)
    model.fit(dataset)

    # The trainer is copied for the fit, with its callbacks.
    (clock,) = [c for c in model.fit_trainer.callbacks if isinstance(c, EpochClock)]
    np.savez(lists_path, lists=recommend(model, dataset, events["targets"], settings["k"]))
    # It reads the last events of a user and leaves the others out.
    tokens = len(model.data_preparator.train_dataset.interactions.df)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in VERSIONS)
    print(json.dumps({"tokens": tokens, "epoch_s": clock.seconds, "versions": versions}))


if __name__ == "__main__":
    main()

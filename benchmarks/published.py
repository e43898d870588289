"""The files that papers evaluate on, as token stores: read below `$NEXTITEM_DATA`, in the order of
the file, nothing removed.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from recsys.catalogue import Catalogue
from recsys.context import NO_TIME, ContextConfig, ContextEncoder
from recsys.interactions import training_counts
from recsys.splits import Split, leave_one_out
from recsys.tokens import TokenStore, previous_times

NO_CONTEXT = ContextConfig(categorical=(), time=())


@dataclass(frozen=True)
class Dataset:
    """A file as the models see it. Users are in ascending order of their ids."""

    name: str
    catalogue: Catalogue
    context: ContextEncoder
    store: TokenStore
    split: Split


def data_folder() -> Path:
    """Where the data sets lie. Raises: FileNotFoundError when the variable is not set."""
    folder = os.environ.get("NEXTITEM_DATA")
    if not folder:
        raise FileNotFoundError("NEXTITEM_DATA is not set; set it to the folder above ml-1m.")
    return Path(folder)


def read_pairs(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Users and items, int64 `[T]`, of a file with a line `user item` an event."""
    pairs_T2 = np.loadtxt(path, dtype=np.int64)
    return pairs_T2[:, 0], pairs_T2[:, 1]


def read_lists(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Users and items, int64 `[T]`, of a file with a line `user item item ...` a user."""
    lines = [np.array(line.split(), np.int64) for line in path.read_text().splitlines()]
    users_T = np.repeat([line[0] for line in lines], [len(line) - 1 for line in lines])
    return users_T, np.concatenate([line[1:] for line in lines])


def read_ratings(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items and microseconds, int64 `[T]`, of `user::item::rating::seconds` lines."""
    columns_T4 = np.loadtxt((line.replace("::", " ") for line in path.open()), dtype=np.int64)
    return columns_T4[:, 0], columns_T4[:, 1], columns_T4[:, 3] * 1_000_000


def assemble(
    name: str,
    users_T: np.ndarray,
    items_T: np.ndarray,
    timestamps_T: np.ndarray | None = None,
    context: ContextConfig = NO_CONTEXT,
) -> Dataset:
    """A data set of events that are in order within each user; a stable sort by time where there
    are times.
    """
    times_T = np.full(len(users_T), NO_TIME) if timestamps_T is None else timestamps_T
    order = np.lexsort((times_T, users_T))
    user_ids_U, counts_U = np.unique(users_T, return_counts=True)
    offsets_U = np.concatenate([[0], np.cumsum(counts_U)]).astype(np.int64)
    item_ids = np.unique(items_T)
    encoder = ContextEncoder.learn(context, {})
    times_T = times_T[order]
    bare = Catalogue.build(pa.array(item_ids), np.zeros(len(item_ids), np.int64), None)
    store = TokenStore(
        pa.array(user_ids_U),
        offsets_U,
        bare.encode(pa.array(items_T[order])),
        encoder.encode(times_T, previous_times(times_T, offsets_U), {}),
        times_T,
    )
    split = leave_one_out(offsets_U)
    counts_I = training_counts(store, split, bare.num_rows)
    catalogue = Catalogue.build(bare.item_ids, counts_I[-bare.num_items :], None)
    return Dataset(name, catalogue, encoder, store, split)


def read_dataset(name: str) -> Dataset:
    """One of `DATASETS`. Raises: KeyError, FileNotFoundError."""
    return DATASETS[name]()


def _ml_1m() -> Dataset:
    return assemble("ml-1m.txt", *read_pairs(data_folder() / "ml-1m/ml-1m.txt"))


def _ml_1m_ratings() -> Dataset:
    clock = ContextConfig(categorical=(), time=("hour", "weekday", "gap"))
    return assemble("ml-1m ratings.dat", *read_ratings(data_folder() / "ml-1m/ratings.dat"), clock)


def _beauty() -> Dataset:
    return assemble("beauty", *read_lists(data_folder() / "beauty/Beauty.txt"))


DATASETS = {"ml-1m": _ml_1m, "ml-1m-ratings": _ml_1m_ratings, "beauty": _beauty}

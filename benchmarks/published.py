"""The data sets of the leader board as token stores: files that papers evaluate on, read below
`$NEXTITEM_DATA` in their own order with nothing removed, and a synthetic shop.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_lake.synthetic import ShopConfig, build_shop
from data_lake.synthetic_events import generate_part
from data_lake.synthetic_rows import clean_rows
from data_lake.synthetic_visits import users_table
from recsys.catalogue import Catalogue
from recsys.context import NO_TIME, ContextConfig, ContextEncoder
from recsys.interactions import training_counts, training_positions
from recsys.splits import CutTarget, Split, leave_one_out, temporal_cut
from recsys.tokens import TokenStore, previous_times

NO_CONTEXT = ContextConfig(categorical=(), time=())
ORIGINAL_TIMES = "original times"
_ORIGINAL_SINCE_S = 975_715_200
"""2000-12-02 00:00 UTC."""


@dataclass(frozen=True)
class Events:
    """T events as a file has them, in order within each user."""

    users_T: np.ndarray
    """int64 ids."""
    items_T: np.ndarray
    """int64 ids."""
    timestamps_T: np.ndarray
    """int64, microseconds; NO_TIME throughout where the file has none."""
    columns: Mapping[str, pa.Array] = field(default_factory=dict)
    """Text of each event that a context may name."""
    items: pa.Table | None = None
    """item_id and attributes of the items, where the file's publisher gives any."""
    marks: Mapping[str, np.ndarray] = field(default_factory=dict)
    """bool `[T]` by name: parts of the events that figures are given for by themselves, too."""


@dataclass(frozen=True)
class Dataset:
    """Events as models see them. Users are in ascending order of their ids."""

    name: str
    protocol: str
    catalogue: Catalogue
    context: ContextEncoder
    store: TokenStore
    split: Split
    marks: Mapping[str, np.ndarray]
    """As those of `Events`, in the order of the store."""


def read_dataset(
    name: str,
    context: ContextConfig = NO_CONTEXT,
    cut: tuple[float, float] | None = None,
    cut_target: CutTarget = "first",
) -> Dataset:
    """One of `DATASETS`, split by leave-one-out, or by the clock with a `cut`: validation begins at
    the first and test at the second quantile of all times, and a user's first or last event in a
    period is the target there.

    Raises: KeyError, FileNotFoundError, ValueError for a cut through events without times.
    """
    events = _in_order(DATASETS[name]())
    user_ids_U, counts_U = np.unique(events.users_T, return_counts=True)
    offsets_U = np.concatenate([[0], np.cumsum(counts_U)]).astype(np.int64)
    split = _split(offsets_U, events.timestamps_T, cut, cut_target)
    item_ids, places_T = np.unique(events.items_T, return_inverse=True)
    bare = Catalogue.build(pa.array(item_ids), np.zeros(len(item_ids), np.int64), None)
    store = TokenStore(
        pa.array(user_ids_U),
        offsets_U,
        bare.encode(pa.array(item_ids))[places_T],
        np.zeros((len(places_T), 0), np.uint8),
        events.timestamps_T,
    )
    counts_I = training_counts(store, split, bare.num_rows)
    encoder = _learn_context(context, events, training_positions(store, split))
    previous_T = previous_times(events.timestamps_T, offsets_U)
    codes_TF = encoder.encode(events.timestamps_T, previous_T, events.columns)
    return Dataset(
        name,
        name_protocol(cut, cut_target),
        Catalogue.build(bare.item_ids, counts_I[-bare.num_items :], events.items),
        encoder,
        TokenStore(store.user_ids, offsets_U, store.items_T, codes_TF, store.timestamps_T),
        split,
        events.marks,
    )


def name_protocol(cut: tuple[float, float] | None, cut_target: CutTarget = "first") -> str:
    """How a data set is split, in words."""
    if cut is None:
        return "leave-one-out"
    which = ", last targets" if cut_target == "last" else ""
    return f"temporal cut at {cut[0]:.0%} and {cut[1]:.0%}{which}"


def read_pairs(path: Path) -> Events:
    """A file with a line `user item` an event."""
    pairs_T2 = np.loadtxt(path, dtype=np.int64)
    return Events(pairs_T2[:, 0], pairs_T2[:, 1], np.full(len(pairs_T2), NO_TIME))


def read_lists(path: Path) -> Events:
    """A file with a line `user item item ...` a user."""
    lines = [np.array(line.split(), np.int64) for line in path.read_text().splitlines()]
    users_T = np.repeat([line[0] for line in lines], [len(line) - 1 for line in lines])
    items_T = np.concatenate([line[1:] for line in lines])
    return Events(users_T, items_T, np.full(len(items_T), NO_TIME))


def read_beauty(folder: Path) -> Events:
    """S3-Rec's file of Amazon Beauty, with the attributes of its items."""
    events = read_lists(folder / "Beauty.txt")
    attributes = json.loads((folder / "Beauty_item2attributes.json").read_text())
    item_ids = np.unique(events.items_T)
    items = pa.table({"item_id": item_ids, "attributes": [attributes[str(i)] for i in item_ids]})
    return replace(events, items=items)


def read_ratings(folder: Path) -> Events:
    """MovieLens: `user::item::rating::seconds`, and `user::gender::age::...` as the segment.

    In our copy the times of ratings of 3 and less before December 2nd, 2000 lie between those of
    their neighbours instead of where they were; `ORIGINAL_TIMES` marks the others.
    """
    lines = (line.replace("::", " ") for line in (folder / "ratings.dat").open())
    users_T, items_T, ratings_T, seconds_T = np.loadtxt(lines, dtype=np.int64).T
    of_user = [line.split("::") for line in (folder / "users.dat").read_text().splitlines()]
    segments = {int(user): f"{gender} {age}" for user, gender, age, *_ in of_user}
    segments_T = pa.array([segments[user] for user in users_T.tolist()])
    is_original_T = (ratings_T > 3) | (seconds_T >= _ORIGINAL_SINCE_S)
    return Events(
        users_T,
        items_T,
        seconds_T * 1_000_000,
        {"segment": segments_T},
        marks={ORIGINAL_TIMES: is_original_T},
    )


def read_clicks(path: Path) -> Events:
    """The clicks of globo; codes of device, region and referrer are kept as text.

    The log invents the time of the last click of a session: 99.93 % of them come 30,000 ms after
    the click before, of all others 0.0008 %. A context of globo therefore leaves `gap` out: at a
    request it would say that this click ends its session, as every target of leave-one-out does.
    Hours and weekdays tell no more for it: half a minute moves 0.8 % of clicks into another hour.
    """
    clicks = pq.read_table(path)
    names = {
        "device": "click_deviceGroup",
        "region": "click_region",
        "referrer": "click_referrer_type",
    }
    return Events(
        clicks["user_id"].to_numpy(),
        clicks["click_article_id"].to_numpy(),
        clicks["click_timestamp"].cast(pa.int64()).to_numpy() * 1000,
        {name: clicks[column].cast(pa.string()).combine_chunks() for name, column in names.items()},
    )


def make_shop(config: ShopConfig, seed: int) -> Events:
    """The clean events of a synthetic shop, with device, event type and segment."""
    shop = build_shop(config, seed)
    parts, segments = [], []
    for part in range(config.num_parts):
        trajectories = generate_part(shop, part)
        parts.append(clean_rows(shop, part, trajectories))
        users = users_table(trajectories.visitors)
        places = np.searchsorted(users["user_id"].to_numpy(), parts[-1]["user_id"].to_numpy())
        segments.append(users["segment"].combine_chunks().take(pa.array(places)))
    rows = pa.concat_tables(parts)
    columns = {
        name: rows[name].combine_chunks().cast(pa.string()) for name in ("device", "event_type")
    }
    return Events(
        rows["user_id"].to_numpy(),
        rows["item_id"].to_numpy(),
        rows["timestamp"].cast(pa.int64()).to_numpy(),
        columns | {"segment": pa.concat_arrays(segments).cast(pa.string())},
    )


def _in_order(events: Events) -> Events:
    order = np.lexsort((events.timestamps_T, events.users_T))
    return Events(
        events.users_T[order],
        events.items_T[order],
        events.timestamps_T[order],
        {name: values.take(pa.array(order)) for name, values in events.columns.items()},
        events.items,
        {name: marks_T[order] for name, marks_T in events.marks.items()},
    )


def _split(
    offsets_U: np.ndarray,
    timestamps_T: np.ndarray,
    cut: tuple[float, float] | None,
    cut_target: CutTarget,
) -> Split:
    if cut is None:
        return leave_one_out(offsets_U)
    if (timestamps_T == NO_TIME).any():
        raise ValueError("This data set has no times, so it cannot be cut by them; leave cut out.")
    validation_us, test_us = np.quantile(timestamps_T, cut).astype(np.int64).tolist()
    cuts = validation_us, test_us
    return temporal_cut(offsets_U, timestamps_T, *cuts, cut_target=cut_target)


def _learn_context(
    config: ContextConfig, events: Events, positions_T: np.ndarray
) -> ContextEncoder:
    values = {
        name: Counter(events.columns[name].take(pa.array(positions_T)).to_pylist())
        for name in config.categorical
    }
    return ContextEncoder.learn(config, values)


def _data(path: str) -> Path:
    folder = os.environ.get("NEXTITEM_DATA")
    if not folder:
        raise FileNotFoundError("NEXTITEM_DATA is not set; set it to the folder above ml-1m.")
    return Path(folder) / path


DATASETS: Mapping[str, Callable[[], Events]] = {
    "ml-1m.txt": lambda: read_pairs(_data("ml-1m/ml-1m.txt")),
    "ml-1m": lambda: read_ratings(_data("ml-1m")),
    "beauty": lambda: read_beauty(_data("beauty")),
    "globo": lambda: read_clicks(_data("globo/clicks.parquet")),
    "shop": lambda: make_shop(ShopConfig(num_users=20_000, num_items=1_000), seed=7),
    "shop-1m": lambda: make_shop(
        ShopConfig(num_users=300_000, num_items=2_000_000, num_categories=1_000), seed=7
    ),
    "small-shop": lambda: make_shop(ShopConfig(num_users=300, num_items=200), seed=7),
}

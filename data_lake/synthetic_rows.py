"""A part of the synthetic shop as raw rows: the clean events, and the dirt that real logs have.

Whatever is broken comes on top: once duplicates are dropped and broken rows are put aside, exactly
the clean events are left.
"""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_lake.schemas import TIMESTAMP, events_schema
from data_lake.synthetic import DEVICES, Shop
from data_lake.synthetic_events import EVENT_TYPES, Trajectories

RAW_COLUMNS = (
    "event_id",
    "user_id",
    "item_id",
    "event_type",
    "timestamp",
    "device",
    "session_id",
    "price",
    "quantity",
)

_HOUR_US = 3_600_000_000
_FAR_FUTURE = 7_258_118_400_000_000  # the year 2200
_UNTYPED_SHARE = 0.2  # of the broken rows


def raw_schema() -> pa.Schema:
    """The event columns that a source has; nobody has checked them, so each may be null."""
    schema = events_schema("int64", "int64")
    return pa.schema([schema.field(name).with_nullable(True) for name in RAW_COLUMNS])


def clean_rows(shop: Shop, part: int, trajectories: Trajectories) -> pa.Table:
    """The events of one part, user after user, in order of time."""
    moments, visitors = trajectories.moments, trajectories.visitors
    num_rows = len(moments.time_us)
    stage = trajectories.stage
    number = pa.array(np.arange(num_rows)).cast(pa.string())
    session = pa.array(moments.session).cast(pa.string())
    quantity = pa.array(np.ones(num_rows, np.int32), mask=stage == 0)
    user_ids = np.repeat(visitors.user_ids, np.diff(moments.offsets))
    columns = [
        pc.binary_join_element_wise(f"e{part}", number, "-"),
        pa.array(user_ids),
        pa.array(shop.catalogue.item_ids[trajectories.item]),
        pa.array(EVENT_TYPES).take(pa.array(stage)),
        pa.array(moments.time_us).cast(TIMESTAMP),
        pa.array(DEVICES).take(pa.array(moments.device)),
        pc.binary_join_element_wise(f"s{part}", session, "-"),
        pa.array(shop.catalogue.price[trajectories.item]),
        quantity,
    ]
    return pa.Table.from_arrays(columns, schema=raw_schema())


def soil_rows(clean: pa.Table, shop: Shop, part: int) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The rows as a source delivers them, and further ones whose cells do not fit their types.

    Ordered by delivery: the time of the event, later for late rows and second deliveries.
    """
    config = shop.config
    rng = np.random.default_rng([shop.seed, 2, part])
    num_rows = clean.num_rows
    duplicates = np.flatnonzero(rng.random(num_rows) < config.duplicate_share)
    broken = np.flatnonzero(rng.random(num_rows) < config.broken_share)
    untyped = rng.random(len(broken)) < _UNTYPED_SHARE

    # The broken rows are copies of real ones under ids of their own.
    source = np.concatenate([np.arange(num_rows), duplicates, broken[~untyped]])
    delivered = clean["timestamp"].cast(pa.int64()).to_numpy()[source]
    is_late = rng.random(len(source)) < config.late_share
    is_late[num_rows : num_rows + len(duplicates)] = True
    delay = rng.exponential(6 * _HOUR_US, len(source)).astype(np.int64)
    order = np.argsort(delivered + delay * is_late, kind="stable")

    wrong = _break(clean.take(pa.array(broken[~untyped])), part)
    rows = pa.concat_tables([clean, clean.take(pa.array(duplicates)), wrong]).combine_chunks()
    return rows.take(pa.array(order)), _untype(clean.take(pa.array(broken[untyped])), part)


def dump_lines(rows: list[dict[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _break(rows: pa.Table, part: int) -> pa.Table:
    """Gives each row one fault in turn: no user, item or type, an absurd time, a negative price."""
    kind = np.arange(rows.num_rows) % 5
    faults = {
        "event_id": _fresh_ids(rows.num_rows, f"broken-{part}"),
        "user_id": _where(kind == 0, None, rows["user_id"]),
        "item_id": _where(kind == 1, None, rows["item_id"]),
        "event_type": _where(kind == 2, "", rows["event_type"]),
        "timestamp": _where(kind == 3, _FAR_FUTURE, rows["timestamp"]),
        "price": _where(kind == 4, -1.0, rows["price"]),
    }
    columns = [faults.get(name, rows[name]) for name in rows.column_names]
    return pa.Table.from_arrays(columns, schema=rows.schema)


def _untype(rows: pa.Table, part: int) -> list[dict[str, Any]]:
    """Rows as JSON, each with one cell that is not what its column should hold."""
    faults = ({"user_id": "guest"}, {"timestamp": "yesterday"}, {"price": "free"})
    rows = rows.set_column(0, "event_id", _fresh_ids(rows.num_rows, f"untyped-{part}"))
    rows = rows.set_column(
        rows.column_names.index("timestamp"),
        "timestamp",
        pc.strftime(rows["timestamp"], format="%Y-%m-%dT%H:%M:%SZ"),
    )
    return [row | faults[index % len(faults)] for index, row in enumerate(rows.to_pylist())]


def _fresh_ids(num_rows: int, prefix: str) -> pa.Array:
    return pc.binary_join_element_wise(prefix, pa.array(np.arange(num_rows)).cast(pa.string()), "-")


def _where(mask: np.ndarray, value: Any, column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pa.array(mask, pa.bool_()), pa.scalar(value, column.type), column)

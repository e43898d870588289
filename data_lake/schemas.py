"""The tables of the lake: their columns, in order, and how they are partitioned.

An id column is either `int64` or `string`, chosen once when the table is created; `event_id` is
always a string. Timestamps are microseconds in UTC. Events are ordered by `(timestamp, ingested_at,
arrival)`. A shop's own context (region, referrer, ...) comes as further text columns, which stand
behind all others, so that one can be added to a table that is there.
"""

from collections.abc import Sequence
from typing import Literal

import pyarrow as pa

IdType = Literal["int64", "string"]
TIMESTAMP = pa.timestamp("us", tz="UTC")
PARTITION = "user_bucket"
PARTITIONED_TABLES = ("events", "users", "sequences", "recommendations")

_ID_TYPES: dict[str, pa.DataType] = {"int64": pa.int64(), "string": pa.string()}


def events_schema(user_id: IdType, item_id: IdType, context: Sequence[str] = ()) -> pa.Schema:
    """One row an interaction; `arrival` orders the rows of one ingest run as they stood in the
    source. `context` names further text columns.
    """
    return pa.schema(
        [
            pa.field("event_id", pa.string(), nullable=False),
            pa.field("user_id", _ID_TYPES[user_id], nullable=False),
            pa.field("item_id", _ID_TYPES[item_id], nullable=False),
            pa.field("event_type", pa.string(), nullable=False),
            pa.field("timestamp", TIMESTAMP, nullable=False),
            pa.field("device", pa.string()),
            pa.field("session_id", pa.string()),
            pa.field("price", pa.float64()),
            pa.field("quantity", pa.int32()),
            pa.field("ingested_at", TIMESTAMP, nullable=False),
            pa.field("arrival", pa.int64(), nullable=False),
            pa.field(PARTITION, pa.int32(), nullable=False),
            *(pa.field(name, pa.string()) for name in context),
        ]
    )


def items_schema(item_id: IdType) -> pa.Schema:
    """One row an item; every attribute may be missing."""
    return pa.schema(
        [
            pa.field("item_id", _ID_TYPES[item_id], nullable=False),
            pa.field("title", pa.string()),
            pa.field("category", pa.string()),
            pa.field("brand", pa.string()),
            pa.field("price", pa.float64()),
            pa.field("available", pa.bool_()),
            pa.field("created_at", TIMESTAMP),
        ]
    )


def users_schema(user_id: IdType) -> pa.Schema:
    """One row a user; `segment` is the shop's own grouping (loyalty tier, age band, ...)."""
    return pa.schema(
        [
            pa.field("user_id", _ID_TYPES[user_id], nullable=False),
            pa.field("segment", pa.string()),
            pa.field("signup_at", TIMESTAMP),
            pa.field(PARTITION, pa.int32(), nullable=False),
        ]
    )


def sequences_schema(user_id: IdType, item_id: IdType, context: Sequence[str] = ()) -> pa.Schema:
    """One row a user: lists of equal length, oldest event first; `context` as in `events_schema`,
    a list a column.
    """
    return pa.schema(
        [
            pa.field("user_id", _ID_TYPES[user_id], nullable=False),
            pa.field("segment", pa.string()),
            pa.field("item_ids", pa.list_(_ID_TYPES[item_id]), nullable=False),
            pa.field("event_types", pa.list_(pa.string()), nullable=False),
            pa.field("timestamps", pa.list_(TIMESTAMP), nullable=False),
            pa.field("devices", pa.list_(pa.string()), nullable=False),
            pa.field(PARTITION, pa.int32(), nullable=False),
            *(pa.field(name, pa.list_(pa.string())) for name in context),
        ]
    )


def recommendations_schema(user_id: IdType, item_id: IdType) -> pa.Schema:
    """One row a user: two lists of equal length, best item first, and what made them; `source` is
    "model" or "fallback".
    """
    return pa.schema(
        [
            pa.field("user_id", _ID_TYPES[user_id], nullable=False),
            pa.field("item_ids", pa.list_(_ID_TYPES[item_id]), nullable=False),
            pa.field("scores", pa.list_(pa.float32()), nullable=False),
            pa.field("model_version", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("created_at", TIMESTAMP, nullable=False),
            pa.field(PARTITION, pa.int32(), nullable=False),
        ]
    )


def quarantine_schema() -> pa.Schema:
    """A row that could not be taken: `raw` is the row as it came, as JSON or text."""
    return pa.schema(
        [
            pa.field("raw", pa.string()),
            pa.field("reason", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("ingested_at", TIMESTAMP, nullable=False),
        ]
    )


def id_type_of(schema: pa.Schema, column: str) -> IdType:
    """The id type that a table was created with."""
    return "int64" if schema.field(column).type == pa.int64() else "string"


def context_columns_of(events: pa.Schema) -> tuple[str, ...]:
    """The shop's own context columns of an events table, in their order."""
    ours = set(events_schema("string", "string").names)
    return tuple(name for name in events.names if name not in ours)

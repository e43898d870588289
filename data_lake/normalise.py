"""From raw columns to rows of the lake: rename, join, map, cast and check, column by column.

A row that does not fit is told apart with the first reason that was found, never dropped.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_lake.buckets import hash_ids, mix
from data_lake.errors import SourceError
from data_lake.schemas import TIMESTAMP
from data_lake.sources import RawRows, SourceConfig

_US_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1}
_EARLIEST_US = 631_152_000_000_000
"""1990-01-01; a shop's log knows nothing older."""
_FUTURE_US = 86_400_000_000
_INTEGER = r"^[+-]?\d{1,18}$"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?$"
_ID_COLUMNS = ("user_id", "item_id")


@dataclass(frozen=True)
class Normalised:
    """`rows` fit the schema that was asked for; each of `rejected` says why it does not."""

    rows: pa.Table
    rejected: pa.Table
    """Columns `raw` (the row as JSON, or the line itself) and `reason`."""


@dataclass(frozen=True)
class _Column:
    values: pa.Array
    """Null where nothing was given or where it could not be read."""
    is_bad: np.ndarray
    """Given, but not readable."""


def normalise(
    raw: RawRows, source: SourceConfig, schema: pa.Schema, *, now_us: int | None = None
) -> Normalised:
    """Columns of `schema` that the source gives or `constants` set; others are left to the caller.

    Args:
        now_us: time of the load, microseconds; timestamps more than a day later are rejected.

    Raises: SourceError when a column that may not be null has no source.
    """
    table, num_rows = raw.columns.combine_chunks(), raw.columns.num_rows
    columns, reasons = {}, _Reasons(num_rows)
    for field in schema:
        if field.name not in source.columns and field.name not in source.constants:
            continue
        column = _read_column(table, source, field)
        columns[field.name] = column.values
        reasons.add(column.is_bad, f"{field.name} is not a {_kind(field.type)}")
        if not field.nullable:
            reasons.add(_is_null(column.values), f"{field.name} is missing")
        _check_range(field.name, column.values, reasons, now_us)

    keep = pa.array(reasons.is_good)
    rows = pa.table(columns, schema=pa.schema([schema.field(name) for name in columns]))
    return Normalised(rows.filter(keep), _rejected(table, reasons, raw.misfits))


def derive_event_ids(rows: pa.Table) -> pa.Array:
    """Ids made of what a row says, 16 hex digits: the same row is the same event, wherever it is.

    Two rows that differ share an id with a chance of 2^-64.
    """
    combined = np.zeros(rows.num_rows, np.uint64)
    for name in sorted(rows.column_names):
        combined = mix(combined ^ _hash_column(rows[name].combine_chunks()))
    octets = combined.astype(">u8").view(np.uint8).reshape(-1, 8)
    nibbles = np.stack([octets >> 4, octets & 15], axis=2).reshape(-1)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)[nibbles]
    offsets = np.arange(rows.num_rows + 1, dtype=np.int32) * 16
    return pa.StringArray.from_buffers(rows.num_rows, pa.py_buffer(offsets), pa.py_buffer(digits))


class _Reasons:
    """For each row the first reason against it."""

    def __init__(self, num_rows: int) -> None:
        self.codes = np.zeros(num_rows, np.int16)
        self.texts = [""]

    def add(self, is_wrong: np.ndarray, text: str) -> None:
        if is_wrong.any():
            self.texts.append(text)
            self.codes[is_wrong & (self.codes == 0)] = len(self.texts) - 1

    @property
    def is_good(self) -> np.ndarray:
        is_good: np.ndarray = self.codes == 0
        return is_good


def _read_column(table: pa.Table, source: SourceConfig, field: pa.Field) -> _Column:
    if field.name in source.constants:
        given = pa.array([source.constants[field.name]] * table.num_rows, pa.string())
    else:
        given = _given(table, source.columns[field.name])
    if field.name in source.first_of:
        given = _first_of(given, source.first_of[field.name])
    if field.name in source.values:
        given = _mapped(given, source.values[field.name])
    if given.type == field.type and not pa.types.is_string(given.type):
        return _Column(given, np.zeros(len(given), bool))
    if field.type == TIMESTAMP:
        return _as_timestamps(given, source)
    return _CASTS[field.type](given)


def _given(table: pa.Table, names: str | tuple[str, ...]) -> pa.Array:
    if isinstance(names, str):
        return _decoded(_array(table[names]))
    parts = [_as_strings(_decoded(_array(table[name]))).values for name in names]
    return pc.binary_join_element_wise(*parts, "-")


def _as_strings(values: pa.Array) -> _Column:
    if not pa.types.is_string(values.type):
        values = values.cast(pa.string())
    trimmed = pc.utf8_trim_whitespace(values)
    is_empty = pc.equal(trimmed, "")
    return _Column(
        pc.if_else(is_empty, pa.scalar(None, pa.string()), trimmed), np.zeros(len(values), bool)
    )


def _as_integers(values: pa.Array) -> _Column:
    if pa.types.is_integer(values.type):
        return _Column(values.cast(pa.int64()), np.zeros(len(values), bool))
    if pa.types.is_floating(values.type):
        is_whole = pc.equal(pc.floor(values), values)
        return _Column(
            pc.if_else(is_whole, values, None).cast(pa.int64(), safe=False),
            ~_true(is_whole) & ~_is_null(values),
        )
    return _parsed(values, _INTEGER, lambda texts: texts.cast(pa.int64()))


def _as_int32(values: pa.Array) -> _Column:
    column = _as_integers(values)
    fits = pc.and_(pc.less(column.values, 2**31), pc.greater_equal(column.values, -(2**31)))
    return _Column(
        pc.if_else(fits, column.values, None).cast(pa.int32()),
        column.is_bad | (~_true(fits) & ~_is_null(column.values)),
    )


def _as_floats(values: pa.Array) -> _Column:
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        floats = values.cast(pa.float64())
        is_finite = pc.is_finite(floats)
        return _Column(pc.if_else(is_finite, floats, None), ~_true(is_finite) & ~_is_null(floats))
    return _parsed(values, _NUMBER, lambda texts: texts.cast(pa.float64()))


def _as_booleans(values: pa.Array) -> _Column:
    texts = pc.utf8_lower(_as_strings(values).values)
    is_true = pc.is_in(texts, pa.array(["true", "1", "yes"]))
    is_known = pc.or_(is_true, pc.is_in(texts, pa.array(["false", "0", "no"])))
    return _Column(pc.if_else(is_known, is_true, None), ~_true(is_known) & ~_is_null(texts))


def _as_timestamps(values: pa.Array, source: SourceConfig) -> _Column:
    if pa.types.is_timestamp(values.type):
        if values.type.tz is None:
            values = pc.assume_timezone(values, source.timezone, ambiguous="earliest")
        return _Column(values.cast(TIMESTAMP, safe=False), np.zeros(len(values), bool))
    if source.timestamp_unit == "iso":
        return _as_iso_timestamps(_as_strings(values).values, source.timezone)
    numbers = _as_floats(values) if pa.types.is_floating(values.type) else _as_integers(values)
    factor = _US_PER_UNIT[source.timestamp_unit]
    # Far beyond every calendar; kept so that the check of the range says so.
    limit = 4_000_000_000_000_000 // factor
    clipped = pc.max_element_wise(pc.min_element_wise(numbers.values, limit), -limit)
    clipped = pc.if_else(pc.is_valid(numbers.values), clipped, None)
    scaled = pc.multiply(clipped, factor).cast(pa.int64(), safe=False)
    return _Column(scaled.cast(TIMESTAMP), numbers.is_bad)


def _as_iso_timestamps(texts: pa.Array, timezone: str) -> _Column:
    zone = ZoneInfo(timezone)
    # Dates repeat less than rows do, and each distinct text is parsed once.
    encoded = pc.dictionary_encode(texts)
    parsed = [_parse_iso(text, zone) for text in encoded.dictionary.to_pylist()]
    values = pa.array(parsed, TIMESTAMP).take(encoded.indices)
    return _Column(values, _is_null(values) & ~_is_null(texts))


def _parse_iso(text: str, zone: ZoneInfo) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=zone)).astimezone(
            ZoneInfo("UTC")
        )
    except (ValueError, OverflowError):
        return None


def _parsed(values: pa.Array, pattern: str, cast: Callable[[pa.Array], pa.Array]) -> _Column:
    texts = _as_strings(values).values
    fits = pc.match_substring_regex(texts, pattern)
    return _Column(cast(pc.if_else(fits, texts, None)), ~_true(fits) & ~_is_null(texts))


_CASTS: dict[pa.DataType, Callable[[pa.Array], _Column]] = {
    pa.string(): _as_strings,
    pa.int64(): _as_integers,
    pa.int32(): _as_int32,
    pa.float64(): _as_floats,
    pa.bool_(): _as_booleans,
}


def _check_range(name: str, values: pa.Array, reasons: _Reasons, now_us: int | None) -> None:
    if name == "timestamp":
        times = values.cast(pa.int64())
        reasons.add(_true(pc.less(times, _EARLIEST_US)), "timestamp is before 1990")
        if now_us is not None:
            is_future = _true(pc.greater(times, now_us + _FUTURE_US))
            reasons.add(is_future, "timestamp is in the future")
    elif name in ("price", "quantity"):
        reasons.add(_true(pc.less(values, 0)), f"{name} is negative")


def _rejected(table: pa.Table, reasons: _Reasons, misfits: list[str]) -> pa.Table:
    rows = np.flatnonzero(~reasons.is_good)
    wrong = table.take(pa.array(rows)).to_pylist()
    raw = [json.dumps(row, default=_as_json) for row in wrong] + misfits
    texts = [reasons.texts[code] for code in reasons.codes[rows]]
    texts += ["the line has another number of fields, or is not JSON"] * len(misfits)
    return pa.table({"raw": pa.array(raw, pa.string()), "reason": pa.array(texts, pa.string())})


def _as_json(value: object) -> str:
    return (
        value.decode("utf-8", errors="backslashreplace") if isinstance(value, bytes) else str(value)
    )


def _decoded(values: pa.Array) -> pa.Array:
    if not pa.types.is_binary(values.type):
        return values
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid:
        # Some value is not UTF-8: what cannot be read is shown as such instead of losing the row.
        texts = [
            None if v is None else v.decode("utf-8", errors="replace") for v in values.to_pylist()
        ]
        return pa.array(texts, pa.string())


def _mapped(values: pa.Array, mapping: dict[str, str]) -> pa.Array:
    texts = _as_strings(values).values
    index = pc.index_in(texts, pa.array(list(mapping), pa.string()))
    return pc.coalesce(pa.array(list(mapping.values()), pa.string()).take(index), texts)


def _first_of(values: pa.Array, separator: str) -> pa.Array:
    return pc.list_element(pc.split_pattern(_as_strings(values).values, separator, max_splits=1), 0)


def _hash_column(values: pa.Array) -> np.ndarray:
    if pa.types.is_timestamp(values.type):
        values = values.cast(pa.int64())
    if pa.types.is_floating(values.type):
        values = pa.array(values.fill_null(-1.0).to_numpy(zero_copy_only=False).view(np.int64))
    return hash_ids(pc.fill_null(values, "" if pa.types.is_string(values.type) else -1))


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_timestamp(kind):
        return "time"
    return (
        "whole number"
        if pa.types.is_integer(kind)
        else "number"
        if kind == pa.float64()
        else str(kind)
    )


def _array(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _is_null(values: pa.Array) -> np.ndarray:
    is_null: np.ndarray = pc.is_null(values).to_numpy(zero_copy_only=False)
    return is_null


def _true(mask: pa.Array) -> np.ndarray:
    is_true: np.ndarray = pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
    return is_true


def check_mapped(source: SourceConfig, schema: pa.Schema, required: tuple[str, ...]) -> None:
    mapped = {*source.columns, *source.constants}
    unknown = sorted(mapped - set(schema.names))
    if unknown:
        raise SourceError(
            f"The source {source.path} maps {', '.join(unknown)}, which the lake does not have; "
            f"it has: {', '.join(schema.names)}."
        )
    missing = [name for name in required if name not in mapped]
    if missing:
        raise SourceError(
            f"The source {source.path} gives no {', '.join(missing)}; add it to `columns` or "
            "`constants`."
        )

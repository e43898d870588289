"""From raw columns to rows of the lake: rename, join, map, cast and check, column by column.

A row that does not fit is told apart with the first reason that was found, never dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_lake.buckets import hash_ids, mix
from data_lake.errors import SourceError
from data_lake.readers import RawRows
from data_lake.schemas import TIMESTAMP
from data_lake.sources import SourceConfig

Mask = NDArray[np.bool_]

_US_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1}
_EARLIEST_US = 631_152_000_000_000
"""1990-01-01; a shop's log knows nothing older."""
_DAY_US = 86_400_000_000
_BEYOND_US = 4_000_000_000_000_000
"""The year 2096, and as far before 1970; float64 is exact to the microsecond below it."""
_INTEGER = r"^[+-]?\d{1,19}(\.0*)?$"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?$"
_INT64_MAX = 2**63 - 1
_MISFIT = "the line has too few or too many fields, an open quote, or is no JSON object"


@dataclass(frozen=True)
class Normalised:
    """`rows` fit the schema that was asked for; each of `rejected` says why it does not."""

    rows: pa.Table
    rejected: pa.Table
    """Columns `raw` (the row as JSON, or the line itself) and `reason`."""


@dataclass(frozen=True)
class _Column:
    """Values of one column; bad ones were given, but could not be read, and are null."""

    values: pa.Array
    is_bad: Mask


def check_mapped(source: SourceConfig, schema: pa.Schema, required: tuple[str, ...]) -> None:
    """Whether a source gives what a table needs, and nothing else.

    Raises: SourceError that names the column.
    """
    given = {*source.columns, *source.constants}
    unknown = sorted({*given, *source.values, *source.first_of} - set(schema.names))
    if unknown:
        raise SourceError(
            f"The source {source.path} maps {', '.join(unknown)}, which the table does not have; "
            f"it has: {', '.join(schema.names)}."
        )
    missing = [name for name in required if name not in given]
    if missing:
        raise SourceError(
            f"The source {source.path} gives no {', '.join(missing)}; add it to `columns` or "
            "`constants`."
        )


def normalise(raw: RawRows, source: SourceConfig, schema: pa.Schema, *, now_us: int) -> Normalised:
    """Columns of `schema` that the source gives or `constants` set; others are left to the caller.

    Args:
        now_us: time of the load, microseconds; events more than a day later are rejected.

    Raises: SourceError when a column is of a kind that cannot be read at all (say, a list).
    """
    columns: dict[str, pa.Array] = {}
    reasons = _Reasons(raw.columns.num_rows)
    for field in schema:
        if field.name not in source.columns and field.name not in source.constants:
            continue
        column = _read_column(raw.columns, source, field)
        columns[field.name] = column.values
        reasons.add(column.is_bad, f"{field.name} is not a {_kind(field.type)}")
        if not field.nullable:
            reasons.add(_is_null(column.values), f"{field.name} is missing")
        _check_range(field, column.values, reasons, now_us)

    rows = pa.table(columns)
    if not reasons.is_good.all():
        rows = rows.filter(pa.array(reasons.is_good))
    rows = rows.cast(pa.schema([schema.field(name) for name in columns]))
    return Normalised(rows, _rejected(raw, reasons))


def derive_event_ids(rows: pa.Table) -> pa.Array:
    """Ids made of what a row says, 16 hex digits: the same row is the same event, wherever it is.

    Two rows that differ share an id with a chance of 2^-64.
    """
    combined = np.zeros(rows.num_rows, np.uint64)
    for name in sorted(rows.column_names):
        combined = mix(combined ^ _hash_column(_array(rows[name])))
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

    def add(self, is_wrong: Mask, text: str) -> None:
        if is_wrong.any():
            self.texts.append(text)
            self.codes[is_wrong & (self.codes == 0)] = len(self.texts) - 1

    @property
    def is_good(self) -> Mask:
        return np.equal(self.codes, 0)


def _check_range(field: pa.Field, values: pa.Array, reasons: _Reasons, now_us: int) -> None:
    name = field.name
    if name == "timestamp":
        times = values.cast(pa.int64())
        reasons.add(_true(pc.less(times, _EARLIEST_US)), "timestamp is before 1990")
        reasons.add(_true(pc.greater(times, now_us + _DAY_US)), "timestamp is in the future")
    elif field.type == TIMESTAMP:
        is_far = pc.greater_equal(pc.abs(values.cast(pa.int64())), _BEYOND_US)
        reasons.add(_true(is_far), f"{name} is out of range")
    elif name in ("price", "quantity"):
        reasons.add(_true(pc.less(values, 0)), f"{name} is negative")


def _rejected(raw: RawRows, reasons: _Reasons) -> pa.Table:
    rows = np.flatnonzero(~reasons.is_good)
    texts = [reasons.texts[code] for code in reasons.codes[rows]]
    texts += [_MISFIT] * len(raw.misfits)
    shown = raw.show(rows.tolist()) + raw.misfits if texts else []
    return pa.table({"raw": pa.array(shown, pa.string()), "reason": pa.array(texts, pa.string())})


def _read_column(table: pa.Table, source: SourceConfig, field: pa.Field) -> _Column:
    name = field.name
    try:
        if name in source.constants:
            given = pa.repeat(source.constants[name], table.num_rows)
        else:
            given = _given(table, source.columns[name])
        if name in source.first_of:
            separator = source.first_of[name]
            given = pc.list_element(pc.split_pattern(_texts(given), separator, max_splits=1), 0)
        if name in source.values:
            given = _mapped(_texts(given), source.values[name])
        return (
            _as_timestamps(given, source) if field.type == TIMESTAMP else _CASTS[field.type](given)
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SourceError(
            f"{source.path} has no readable {name} in {source.columns.get(name, '`constants`')!r} "
            f"({error}); map another column."
        ) from None


def _given(table: pa.Table, names: str | tuple[str, ...]) -> pa.Array:
    if isinstance(names, str):
        return _decoded(_array(table[names]))
    parts = [_texts(_decoded(_array(table[name]))) for name in names]
    return pc.binary_join_element_wise(*parts, "-")


def _decoded(values: pa.Array) -> pa.Array:
    if pa.types.is_string(values.type):
        values = values.view(pa.binary())
    if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
        return values
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid:
        # Some value is not UTF-8: what cannot be read is shown as such instead of losing the row.
        texts = [
            None if value is None else value.decode("utf-8", errors="replace")
            for value in values.to_pylist()
        ]
        return pa.array(texts, pa.string())


def _mapped(texts: pa.Array, mapping: dict[str, str]) -> pa.Array:
    index = pc.index_in(texts, pa.array(list(mapping), pa.string()))
    return pc.coalesce(pa.array(list(mapping.values()), pa.string()).take(index), texts)


def _texts(values: pa.Array) -> pa.Array:
    """As trimmed text; empty text is null, and 5.0 is "5"."""
    if pa.types.is_floating(values.type):
        whole = _as_integers(values)
        values = values if whole.is_bad.any() else whole.values
    if not pa.types.is_string(values.type):
        values = values.cast(pa.string())
    trimmed = pc.utf8_trim_whitespace(values)
    is_empty = pc.equal(trimmed, "")
    if not pc.any(is_empty).as_py():
        return trimmed
    return pc.if_else(is_empty, pa.scalar(None, pa.string()), trimmed)


def _as_texts(values: pa.Array) -> _Column:
    return _all_good(_texts(values))


def _as_integers(values: pa.Array) -> _Column:
    if pa.types.is_unsigned_integer(values.type):
        fits = pc.less_equal(values.cast(pa.uint64()), pa.scalar(_INT64_MAX, pa.uint64()))
        return _where(fits, values, pa.int64())
    if pa.types.is_integer(values.type):
        return _all_good(values.cast(pa.int64()))
    if pa.types.is_floating(values.type):
        values = _without_nan(values.cast(pa.float64()))
        is_whole = pc.and_(
            pc.equal(pc.floor(values), values), pc.less(pc.abs(values), float(2**63))
        )
        return _where(is_whole, values, pa.int64())
    return _parsed(values, _INTEGER, pa.int64())


def _as_int32(values: pa.Array) -> _Column:
    column = _as_integers(values)
    fits = pc.and_(pc.less(column.values, 2**31), pc.greater_equal(column.values, -(2**31)))
    narrow = _where(fits, column.values, pa.int32())
    return _Column(narrow.values, narrow.is_bad | column.is_bad)


def _as_floats(values: pa.Array) -> _Column:
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        column = _all_good(values.cast(pa.float64(), safe=False))
    else:
        column = _parsed(values, _NUMBER, pa.float64())
    finite = _without_nan(column.values)
    known = _where(pc.is_finite(finite), finite, pa.float64())
    return _Column(known.values, known.is_bad | column.is_bad)


def _as_booleans(values: pa.Array) -> _Column:
    texts = pc.utf8_lower(_texts(values))
    is_true = pc.is_in(texts, pa.array(["true", "1", "yes"]))
    is_known = pc.or_(is_true, pc.is_in(texts, pa.array(["false", "0", "no"])))
    return _Column(pc.if_else(is_known, is_true, None), ~_true(is_known) & ~_is_null(texts))


def _as_timestamps(values: pa.Array, source: SourceConfig) -> _Column:
    if pa.types.is_date(values.type):
        values = values.cast(pa.timestamp("ms"))
    if pa.types.is_timestamp(values.type):
        return _all_good(_in_utc(values, source.timezone))
    if source.timestamp_unit == "iso":
        return _as_iso_timestamps(_texts(values), source.timezone)
    numbers = _as_floats(values)
    scaled = pc.multiply(numbers.values, float(_US_PER_UNIT[source.timestamp_unit]))
    near = pc.round(_clipped(scaled, float(_BEYOND_US)))
    return _Column(near.cast(pa.int64()).cast(TIMESTAMP), numbers.is_bad)


def _clipped(values: pa.Array, limit: float) -> pa.Array:
    # What is far beyond every calendar is kept at the edge, so that the check of the range says so.
    near = pc.min_element_wise(values, limit, skip_nulls=False)
    return pc.max_element_wise(near, -limit, skip_nulls=False)


def _as_iso_timestamps(texts: pa.Array, timezone: str) -> _Column:
    for kind in (TIMESTAMP, pa.timestamp("us")):
        try:
            return _all_good(_in_utc(texts.cast(kind), timezone))
        except pa.ArrowInvalid:
            pass  # some have an offset and some have none, or some are no time at all
    # Each distinct text is parsed once.
    encoded = pc.dictionary_encode(texts)
    parsed = [_parse_iso(text) for text in encoded.dictionary.to_pylist()]
    aware = pa.array([one if one and one.tzinfo else None for one in parsed], TIMESTAMP)
    naive = [one if one and not one.tzinfo else None for one in parsed]
    local = _in_utc(pa.array(naive, pa.timestamp("us")), timezone)
    values = pc.coalesce(aware, local).take(encoded.indices)
    return _Column(values, _is_null(values) & ~_is_null(texts))


def _in_utc(values: pa.Array, timezone: str) -> pa.Array:
    if values.type.unit in ("s", "ms"):
        limit = _BEYOND_US // _US_PER_UNIT[values.type.unit]
        values = _clipped(values.cast(pa.int64()), limit).cast(values.type)
    if values.type.tz is None:
        values = pc.assume_timezone(values, timezone, ambiguous="earliest", nonexistent="earliest")
    return values.cast(TIMESTAMP, safe=False)


def _parse_iso(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text.replace(" UTC", "+00:00"))
        return moment.astimezone(UTC) if moment.tzinfo else moment
    except (ValueError, OverflowError):
        return None


def _parsed(values: pa.Array, pattern: str, kind: pa.DataType) -> _Column:
    """Numbers from text, null and bad where it does not fit the pattern or the type."""
    texts = _texts(values)
    try:
        numbers = texts.cast(kind)
    except pa.ArrowInvalid:
        pass  # some fit only after a closer look, or not at all
    else:
        # A cast takes hexadecimals and "nan", which the pattern does not.
        if not _may_hold(texts, b"xXnN"):
            return _all_good(numbers)
    encoded = pc.dictionary_encode(texts)
    words = encoded.dictionary
    plain = pc.replace_substring_regex(words, r"^\+|\.0*$", "")
    fitting = pc.if_else(pc.match_substring_regex(words, pattern), plain, None)
    numbers = _cast_some(fitting, kind).take(encoded.indices)
    return _Column(numbers, _is_null(numbers) & ~_is_null(texts))


def _may_hold(texts: pa.Array, letters: bytes) -> bool:
    buffer = texts.buffers()[2]
    content = b"" if buffer is None else buffer.to_pybytes()
    return any(letter in content for letter in letters)


def _cast_some(texts: pa.Array, kind: pa.DataType) -> pa.Array:
    """A cast that gives null where it cannot, found by halving."""
    try:
        return texts.cast(kind)
    except pa.ArrowInvalid:
        if len(texts) == 1:
            return pa.nulls(1, kind)
    middle = len(texts) // 2
    return pa.concat_arrays([_cast_some(texts[:middle], kind), _cast_some(texts[middle:], kind)])


_CASTS: dict[pa.DataType, Callable[[pa.Array], _Column]] = {
    pa.string(): _as_texts,
    pa.int64(): _as_integers,
    pa.int32(): _as_int32,
    pa.float64(): _as_floats,
    pa.bool_(): _as_booleans,
}


def _hash_column(values: pa.Array) -> NDArray[np.uint64]:
    if pa.types.is_timestamp(values.type):
        values = values.cast(pa.int64())
    if pa.types.is_floating(values.type):
        values = pa.array(values.fill_null(-1.0).to_numpy(zero_copy_only=False).view(np.int64))
    return hash_ids(pc.fill_null(values, "" if pa.types.is_string(values.type) else -1))


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_timestamp(kind):
        return "time"
    if pa.types.is_integer(kind):
        return "whole number"
    return "number" if pa.types.is_floating(kind) else str(kind)


def _where(fits: pa.Array, values: pa.Array, kind: pa.DataType) -> _Column:
    if _true(fits).sum() + values.null_count < len(values):
        is_bad = ~_true(fits) & ~_is_null(values)
        values = pc.if_else(fits, values, pa.scalar(None, values.type))
        return _Column(values.cast(kind), is_bad)
    return _all_good(values.cast(kind))


def _all_good(values: pa.Array) -> _Column:
    return _Column(values, np.zeros(len(values), bool))


def _without_nan(values: pa.Array) -> pa.Array:
    """Not a number is how many tools write nothing."""
    is_nan = pc.is_nan(values)
    if not pc.any(is_nan).as_py():
        return values
    return pc.if_else(is_nan, pa.scalar(None, values.type), values)


def _array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _is_null(values: pa.Array) -> Mask:
    return np.asarray(pc.is_null(values).to_numpy(zero_copy_only=False), bool)


def _true(mask: pa.Array) -> Mask:
    return np.asarray(pc.fill_null(mask, False).to_numpy(zero_copy_only=False), bool)

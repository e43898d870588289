"""Reads one part of a raw log, so many rows at a time; values stay as they came, `normalise` makes
sense of them.
"""

import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from data_lake.errors import SourceError
from data_lake.sources import (
    Part,
    SourceConfig,
    field_names,
    flatten_names,
    refuse_missing,
    wanted_columns,
)
from data_lake.storage import Options, open_file

_FIELD_SEPARATOR = "\x1f"
"""Stands for MovieLens' `::`, as the reader takes a single character only."""
_LONGEST_LINE_BYTES = 8 * 2**20
_BATCH_ROWS = 500_000
_BUFFER_BYTES = 2**20
"""Read ahead of each column, so that not a whole row group is in memory."""
_MANY_ROWS = 100
"""Fewer rows may all lack a key without the map being wrong."""
_MUST_OCCUR = ("user_id", "item_id", "event_type", "timestamp")


@dataclass(frozen=True)
class RawRows:
    """What was read of a part."""

    columns: pa.Table
    """At least the columns that are mapped; of any type."""
    misfits: list[str]
    """Lines that are no row at all."""
    show: Callable[[Sequence[int]], list[str]]
    """The whole rows of these indices as text, for quarantine."""

    @property
    def num_read(self) -> int:
        return int(self.columns.num_rows) + len(self.misfits)


def read_part(
    source: SourceConfig, part: Part, options: Options | None = None
) -> Iterator[RawRows]:
    """The rows of one part, as they came: a text at once, Parquet in batches.

    Raises: SourceError when the file is broken or lacks a mapped column.
    """
    try:
        yield from _read_part(source, part, options)
    except OSError as error:
        raise SourceError(f"{part.path} cannot be read ({error}); deliver it again.") from None


def _read_part(source: SourceConfig, part: Part, options: Options | None) -> Iterator[RawRows]:
    if source.format in ("parquet", "delta"):
        yield from _read_parquet(source, part, options)
        return
    text = _read_lines(part, options)
    if source.format == "jsonl":
        yield _read_json_lines(source, part, text)
        return
    if source.format == "movielens":
        separator = _FIELD_SEPARATOR.encode()
        text = text.decode("latin-1").encode().replace(b"::", separator)
    names = field_names(source, part.path, options)
    yield _read_delimited(source, part, _repaired(text), names)


def _read_parquet(source: SourceConfig, part: Part, options: Options | None) -> Iterator[RawRows]:
    whole = _WholeRows(part, options)
    wanted = wanted_columns(source)
    for number, rows in enumerate(_read_batches(part, wanted, options)):
        given = {name: part.given.get(name) for name in wanted if name not in rows.column_names}
        rows = _add_constants(rows, given).select(wanted)
        yield RawRows(rows, [], partial(whole.show, number))


class _WholeRows:
    """Rows with the columns that nobody maps; only read for what is shown, which is little or
    nothing.
    """

    def __init__(self, part: Part, options: Options | None) -> None:
        self.given = part.given
        self.batches = enumerate(_read_batches(part, None, options))

    def show(self, number: int, rows: Sequence[int]) -> list[str]:
        """Rows of one batch as JSON; the numbers of the batches must rise from call to call."""
        if not len(rows):
            return []
        _, batch = next(itertools.dropwhile(lambda found: found[0] < number, self.batches))
        return show_as_json(_add_constants(batch, self.given), rows)


def _read_batches(
    part: Part, columns: Sequence[str] | None, options: Options | None
) -> Iterator[pa.Table]:
    """Those of the columns that the file has; all of them if None."""
    try:
        with open_file(part.path, options) as stream:
            file = pq.ParquetFile(
                stream,
                buffer_size=_BUFFER_BYTES,
                pre_buffer=False,
                page_checksum_verification=True,
            )
            names = file.schema_arrow.names
            groups = list(range(part.start, part.stop))
            wanted = names if columns is None else [name for name in columns if name in names]
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=wanted):
                yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{part.path} cannot be read ({error}); deliver it again.") from None


def _add_constants(rows: pa.Table, values: Mapping[str, Any]) -> pa.Table:
    for name, value in values.items():
        rows = rows.append_column(name, pa.repeat(pa.scalar(value), rows.num_rows))
    return rows


def show_as_json(table: pa.Table, rows: Sequence[int]) -> list[str]:
    """Rows of a table as JSON objects; what JSON lacks becomes text."""
    if not len(rows):
        return []
    shown = table.take(rows)
    for position, field in enumerate(shown.schema):
        # Python knows neither nanoseconds nor the years beyond 9999.
        if pa.types.is_timestamp(field.type) or pa.types.is_date(field.type):
            shown = shown.set_column(position, field.name, shown[position].cast(pa.string()))
    return [json.dumps(row, default=_json_text) for row in shown.to_pylist()]


def _json_text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="backslashreplace")
    return str(value)


def _read_lines(part: Part, options: Options | None) -> bytes:
    # A line belongs to the part in which it starts.
    with io.BufferedReader(open_file(part.path, options)) as file:
        if part.start > 0:
            file.seek(part.start - 1)
            file.readline()
        start = file.tell()
        if start >= part.stop:
            return b""
        text = file.read(part.stop - start)
        return text if text.endswith(b"\n") else text + file.readline()


def _repaired(text: bytes) -> bytes:
    """What is not UTF-8 becomes a question mark in a diamond instead of stopping the reader."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return text.decode(errors="replace").encode()
    return text


def _read_delimited(source: SourceConfig, part: Part, text: bytes, names: Sequence[str]) -> RawRows:
    if source.column_names is None and part.start == 0:
        text = text.partition(b"\n")[2]
    table, misfits = _parse_rows(source, part, text, names)
    return RawRows(table, misfits, lambda rows: show_as_json(table, rows))


def _parse_rows(
    source: SourceConfig, part: Part, text: bytes, names: Sequence[str]
) -> tuple[pa.Table, list[str]]:
    """A row is a line: one whose quotes stay open is a misfit, and must not swallow the next."""
    try:
        table, misfits = _parse_fields(source, text, names)
        if b'"' not in text or table.num_rows + len(misfits) == _count_lines(text):
            return table, misfits
    except pa.ArrowInvalid:
        pass  # an open quote may make a row too long to be read
    lines = text.split(b"\n")
    is_open = [line.count(b'"') % 2 == 1 for line in lines]
    closed = b"\n".join(line for line, left_out in zip(lines, is_open, strict=True) if not left_out)
    left_open = [line.decode() for line, left_out in zip(lines, is_open, strict=True) if left_out]
    try:
        table, misfits = _parse_fields(source, closed, names)
    except pa.ArrowInvalid as error:
        raise SourceError(
            f"{part.path} cannot be read as {source.format} ({error}); correct its lines."
        ) from None
    return table, misfits + left_open


def _count_lines(text: bytes) -> int:
    return sum(1 for line in text.split(b"\n") if line.rstrip(b"\r"))


def _parse_fields(
    source: SourceConfig, text: bytes, names: Sequence[str]
) -> tuple[pa.Table, list[str]]:
    if not text.strip():
        return pa.table({name: pa.array([], pa.string()) for name in names}), []
    misfits: list[str] = []
    is_movielens = source.format == "movielens"

    def keep_misfit(row: pacsv.InvalidRow) -> str:
        misfits.append(row.text.replace(_FIELD_SEPARATOR, "::") if is_movielens else row.text)
        return "skip"

    table = pacsv.read_csv(
        io.BytesIO(text),
        read_options=pacsv.ReadOptions(
            column_names=list(names), use_threads=False, block_size=_LONGEST_LINE_BYTES
        ),
        parse_options=pacsv.ParseOptions(
            delimiter=_FIELD_SEPARATOR if is_movielens else source.delimiter,
            quote_char=False if is_movielens else '"',
            invalid_row_handler=keep_misfit,
        ),
        convert_options=pacsv.ConvertOptions(
            column_types={name: pa.string() for name in names},
            check_utf8=False,
            strings_can_be_null=True,
            null_values=[""],
            quoted_strings_can_be_null=True,
        ),
    )
    return table, misfits


def _read_json_lines(source: SourceConfig, part: Part, text: bytes) -> RawRows:
    lines: list[str] = []
    rows: list[dict[str, object]] = []
    misfits: list[str] = []
    # Not splitlines(): JSON allows further line separators inside of strings.
    for line in text.decode("utf-8", errors="replace").split("\n"):
        row = _parse_object(line)
        if row is not None:
            lines.append(line)
            rows.append(row)
        elif line.strip():
            misfits.append(line)

    _check_keys(source, part, rows)
    columns = {name: _as_array([row.get(name) for row in rows]) for name in wanted_columns(source)}
    return RawRows(pa.table(columns), misfits, lambda wanted: [lines[row] for row in wanted])


def _parse_object(line: str) -> dict[str, object] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _as_array(values: list[object]) -> pa.Array:
    """One type where the values have one, else text."""
    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        return pa.array([_as_text(value) for value in values], pa.string())
    if pa.types.is_nested(array.type) or pa.types.is_null(array.type):
        return pa.array([_as_text(value) for value in values], pa.string())
    return array


def _as_text(value: object) -> str | None:
    if isinstance(value, str):
        # JSON can escape half a character, which is no text.
        return value.encode(errors="replace").decode()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None else json.dumps(value)


def _check_keys(source: SourceConfig, part: Part, rows: list[dict[str, object]]) -> None:
    """A key may be missing in some rows; in all of many it is the map that is wrong."""
    if len(rows) < _MANY_ROWS:
        return
    found: dict[str, None] = {}
    for row in rows:
        found.update(dict.fromkeys(row))
    columns = [source.columns[name] for name in _MUST_OCCUR if name in source.columns]
    refuse_missing(part.path, flatten_names(columns), list(found))

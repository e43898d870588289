"""Raw logs as they come: which files a source has, how they are cut into parts, and how a part is
read. A part is what one task reads; values stay as they came here, `normalise` makes sense of them.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_lake.errors import SourceError
from data_lake.schemas import IdType

_FIELD_SEPARATOR = "\x1f"
"""Stands for MovieLens' `::`, as the reader takes a single character only."""
_PART_BYTES = 32 * 2**20
_PART_ROWS = 500_000
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"PK\x03\x04", b"\x28\xb5\x2f\xfd")
"""How files of gzip, bzip2, zip and zstd begin."""
_LONGEST_LINE_BYTES = 8 * 2**20
_MANY_ROWS = 100
"""Fewer rows may all lack a key without the map being wrong."""
_MUST_OCCUR = ("user_id", "item_id", "event_type", "timestamp")


class SourceConfig(BaseModel):
    """Files of one layout, and which of their columns are which of ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """A file, a folder (all files below it) or a pattern with `*`, local or a URI; may use
    environment variables."""
    format: Literal["parquet", "csv", "jsonl", "movielens"]
    """csv: a row is a line, quotes or not; movielens: the same without a header, fields apart by
    `::`, Latin-1; jsonl: an object a line."""
    columns: dict[str, str | tuple[str, ...]]
    """Column of the lake -> column of the source, or several that are joined by `-`."""
    constants: dict[str, str] = Field(default_factory=dict)
    """Column of the lake -> the same value in every row."""
    values: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Column of the lake -> {value in the source: our value}; other values stay as they are."""
    first_of: dict[str, str] = Field(default_factory=dict)
    """Column of the lake -> separator; what stands before it is kept."""
    column_names: tuple[str, ...] | None = None
    """Names of the columns of a text file without a header."""
    delimiter: str = Field(",", min_length=1, max_length=1)
    timestamp_unit: Literal["s", "ms", "us", "iso"] = "us"
    """Unit of numbers since 1970; iso: text such as 2025-10-09T08:00:00Z."""
    timezone: str = "UTC"
    """IANA name; of timestamps that bring no offset of their own."""

    @field_validator("timezone")
    @classmethod
    def _is_known(cls, timezone: str) -> str:
        try:
            ZoneInfo(timezone)
        except (KeyError, ValueError, OSError):
            raise ValueError(f"there is no time zone {timezone!r}, e.g. Europe/Berlin") from None
        return timezone


class IngestConfig(BaseModel):
    """What goes into the lake, and the shape of its tables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_id: IdType = "string"
    item_id: IdType = "string"
    num_buckets: int = Field(16, ge=1, le=4096)
    """Fixed when the tables are created; 1 to 3 million events a bucket are a good size."""
    again: bool = False
    """Reads files that were ingested before, say after a correction of `columns`; events whose id
    is in the lake still stay once."""
    events: tuple[SourceConfig, ...] = Field(min_length=1)
    items: tuple[SourceConfig, ...] = ()
    users: tuple[SourceConfig, ...] = ()


@dataclass(frozen=True)
class Part:
    """A share of one file: row groups of Parquet, a byte range of text."""

    path: str
    start: int
    stop: int


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


def list_files(source: SourceConfig, path: str) -> list[str]:
    """The files of a source by name, `path` being the expanded one; hidden ones are left out.

    Raises: SourceError when there is none.
    """
    filesystem, name = _locate(path)
    # The query of a URI (`?region=...`) belongs to the store, and so to each of its files.
    scheme, _, rest = path.rpartition("://")
    before, after = (f"{scheme}://", "".join(rest.partition("?")[1:])) if scheme else ("", "")
    found = [f"{before}{file}{after}" for file in _matching_files(filesystem, name)]
    if not found:
        raise SourceError(f"There is no file {path}; check the path of the {source.format} source.")
    return sorted(found)


def digest_file(path: str) -> str:
    """sha256 of a file's bytes, by which it is known again."""
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cut_file(source: SourceConfig, path: str) -> list[Part]:
    """Parts of one file in the order of its rows; none if it is empty.

    Raises: SourceError when it cannot be read or lacks a mapped column.
    """
    if source.format == "parquet":
        return list(_cut_parquet(source, path))
    with _open(path) as file:
        size, magic = file.size(), file.read(4)
    if magic.startswith(_COMPRESSED):
        raise SourceError(f"{path} is compressed; unpack it, for text is read from the middle too.")
    if size and source.format != "jsonl":
        _check_columns(source, path, _field_names(source, path))
    return [
        Part(path, start, min(start + _PART_BYTES, size)) for start in range(0, size, _PART_BYTES)
    ]


def read_part(source: SourceConfig, part: Part) -> RawRows:
    """The rows of one part, as they came.

    Raises: SourceError when the file is broken or lacks a mapped column.
    """
    if source.format == "parquet":
        return _read_parquet(source, part)
    text = _read_lines(part)
    if source.format == "jsonl":
        return _read_json_lines(source, part, text)
    if source.format == "movielens":
        separator = _FIELD_SEPARATOR.encode()
        text = text.decode("latin-1").encode().replace(b"::", separator)
    return _read_delimited(source, part, _repaired(text))


def wanted_columns(source: SourceConfig) -> list[str]:
    """Names of the source's columns that the map uses, each once."""
    return _named(source.columns.values())


def _named(columns: Iterable[str | tuple[str, ...]]) -> list[str]:
    names: dict[str, None] = {}
    for column in columns:
        names.update(dict.fromkeys((column,) if isinstance(column, str) else column))
    return list(names)


def _locate(path: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in path:
        return pafs.LocalFileSystem(), path
    filesystem, name = pafs.FileSystem.from_uri(path)
    return filesystem, name


def _open(path: str) -> Any:
    filesystem, name = _locate(path)
    return filesystem.open_input_file(name)


def _matching_files(filesystem: pafs.FileSystem, name: str) -> list[str]:
    info = filesystem.get_file_info(name)
    if info.type == pafs.FileType.File:
        return [name]
    # A pattern is looked for below the last folder whose name is plain.
    is_pattern = info.type == pafs.FileType.NotFound and "*" in name
    base = name.partition("*")[0].rpartition("/")[0] if is_pattern else name
    below = pafs.FileSelector(base, recursive=True, allow_not_found=True)
    files = [found.path for found in filesystem.get_file_info(below) if found.is_file]
    visible = [file for file in files if not _is_hidden(file.removeprefix(base))]
    return [file for file in visible if _fits(file, name)] if is_pattern else visible


def _is_hidden(name: str) -> bool:
    return any(step.startswith((".", "_")) for step in name.split("/"))


def _fits(file: str, pattern: str) -> bool:
    steps, patterns = file.split("/"), pattern.split("/")
    return len(steps) == len(patterns) and all(map(fnmatch, steps, patterns))


def _cut_parquet(source: SourceConfig, path: str) -> Iterator[Part]:
    try:
        with _open(path) as stream:
            file = pq.ParquetFile(stream)
            names = file.schema_arrow.names
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(
            f"{path} is not a whole Parquet file ({error}); deliver it again."
        ) from None
    _check_columns(source, path, names)
    start, rows = 0, 0
    for group, size in enumerate(sizes):
        rows += size
        if rows >= _PART_ROWS or group == len(sizes) - 1:
            yield Part(path, start, group + 1)
            start, rows = group + 1, 0


def _read_parquet(source: SourceConfig, part: Part) -> RawRows:
    def read(columns: list[str] | None) -> pa.Table:
        try:
            with _open(part.path) as stream:
                groups = list(range(part.start, part.stop))
                return pq.ParquetFile(stream).read_row_groups(groups, columns=columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise SourceError(f"{part.path} cannot be read ({error}); deliver it again.") from None

    # Columns that nobody maps are read for the rows that are shown, which are few or none.
    return RawRows(read(wanted_columns(source)), [], lambda rows: show_as_json(read(None), rows))


def show_as_json(table: pa.Table, rows: Sequence[int]) -> list[str]:
    """Rows of a table as JSON objects; what JSON lacks becomes text."""
    if not len(rows):
        return []
    return [json.dumps(row, default=_json_text) for row in table.take(rows).to_pylist()]


def _json_text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="backslashreplace")
    return str(value)


def _read_lines(part: Part) -> bytes:
    # A line belongs to the part in which it starts.
    with io.BufferedReader(_open(part.path)) as file:
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


def _read_delimited(source: SourceConfig, part: Part, text: bytes) -> RawRows:
    names = _field_names(source, part.path)
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


def _field_names(source: SourceConfig, path: str) -> list[str]:
    if source.column_names is not None:
        return list(source.column_names)
    if source.format == "movielens":
        raise SourceError(f"{path} has no header; give its `column_names`.")
    with io.BufferedReader(_open(path)) as file:
        line = file.readline().decode("utf-8-sig", errors="replace")
    try:
        header = next(csv.reader([line.rstrip("\r\n")], delimiter=source.delimiter), [])
    except csv.Error as error:
        raise SourceError(f"The first line of {path} is no header of a CSV ({error}).") from None
    return [name.strip() for name in header]


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
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([_as_text(value) for value in values], pa.string())
    if pa.types.is_nested(array.type) or pa.types.is_null(array.type):
        return pa.array([_as_text(value) for value in values], pa.string())
    return array


def _as_text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def _check_keys(source: SourceConfig, part: Part, rows: list[dict[str, object]]) -> None:
    """A key may be missing in some rows; in all of many it is the map that is wrong."""
    if len(rows) < _MANY_ROWS:
        return
    found: dict[str, None] = {}
    for row in rows:
        found.update(dict.fromkeys(row))
    columns = [source.columns[name] for name in _MUST_OCCUR if name in source.columns]
    _refuse_missing(part.path, _named(columns), list(found))


def _check_columns(source: SourceConfig, path: str, found: Sequence[str]) -> None:
    _refuse_missing(path, wanted_columns(source), found)


def _refuse_missing(path: str, wanted: Sequence[str], found: Sequence[str]) -> None:
    twice = [name for name in wanted if list(found).count(name) > 1]
    if twice:
        raise SourceError(
            f"{path} has the column {twice[0]!r} more than once; give each a name of its own."
        )
    missing = [name for name in wanted if name not in found]
    if missing:
        raise SourceError(
            f"{path} has no column {', '.join(map(repr, missing))}; it has: {', '.join(found)}. "
            "Correct `columns` or `delimiter` of the source."
        )

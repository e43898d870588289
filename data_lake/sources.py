"""Raw logs: what a configuration says of them, which files they are, and in which parts tasks read
them.
"""

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Literal
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_lake.errors import SourceError
from data_lake.schemas import IdType, events_schema, sequences_schema
from data_lake.storage import Options, locate, open_file, reaching

_PART_BYTES = 32 * 2**20
_PART_ROWS = 500_000
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"PK\x03\x04", b"\x28\xb5\x2f\xfd")
"""How files of gzip, bzip2, zip and zstd begin."""


class SourceConfig(BaseModel):
    """Files of one layout, and which of their columns are which of ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """A file, a folder (all files below it) or a pattern with `*`, local or a URI; may use
    environment variables. The table itself where the format is delta."""
    format: Literal["parquet", "csv", "jsonl", "movielens", "delta"]
    """csv: a row is a line, quotes or not; movielens: the same without a header, fields apart by
    `::`, Latin-1; jsonl: an object a line; delta: the newest version of someone else's table."""
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
    keep_landed_hours: float = Field(24, ge=0)
    """Files of served events are deleted so long after they landed, once they are in the lake."""
    context: tuple[str, ...] = ()
    """Text columns of the shop's own that events carry, e.g. region; new ones are added to a table
    that is there, and are null in its earlier events."""
    events: tuple[SourceConfig, ...] = Field(min_length=1)
    items: tuple[SourceConfig, ...] = ()
    users: tuple[SourceConfig, ...] = ()

    @field_validator("context")
    @classmethod
    def _are_new_names(cls, context: tuple[str, ...]) -> tuple[str, ...]:
        taken = {
            *events_schema("string", "string").names,
            *sequences_schema("string", "string").names,
        }
        # Delta tells names apart by more than upper and lower case.
        for name, count in Counter(name.lower() for name in context).items():
            if not name.isidentifier():
                raise ValueError(f"{name!r} is no column name; use letters, digits and _")
            if name in taken:
                raise ValueError(f"{name} is a column of our own; take another name")
            if count > 1:
                raise ValueError(f"{name} is there {count} times; name it once")
        return context


@dataclass(frozen=True)
class Part:
    """A share of one file: row groups of Parquet, a byte range of text."""

    path: str
    start: int
    stop: int
    weight: float = 1
    """How much of one task's load it is; more than 1 where one row group has very many rows."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Columns that are the same in all rows and not in the file, as a Delta partition has them."""


def list_files(source: SourceConfig, path: str, options: Options | None = None) -> list[str]:
    """The files of a source by name, `path` being the expanded one; hidden ones are left out. A
    Delta table is one file.

    Raises: SourceError when there is none.
    """
    if source.format == "delta":
        return [path]
    filesystem, name = locate(path, options)
    # The query of a URI (`?region=...`) belongs to the store, and so to each of its files.
    scheme, _, rest = path.rpartition("://")
    before, after = (f"{scheme}://", "".join(rest.partition("?")[1:])) if scheme else ("", "")
    with reaching(path, options):
        found = [f"{before}{file}{after}" for file in _matching_files(filesystem, name)]
    if not found:
        raise SourceError(f"There is no file {path}; check the path of the {source.format} source.")
    return sorted(found)


def digest_file(path: str, options: Options | None = None) -> str:
    """sha256 of a file's bytes, by which it is known again."""
    with open_file(path, options) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cut_file(source: SourceConfig, path: str, options: Options | None = None) -> list[Part]:
    """Parts of one file in the order of its rows; none if it is empty.

    Raises: SourceError when it cannot be read or lacks a mapped column.
    """
    if source.format == "parquet":
        names, parts = cut_parquet(path, options)
        refuse_missing(path, wanted_columns(source), names)
        return parts
    with open_file(path, options) as file:
        size, magic = file.size(), file.read(4)
    if magic.startswith(_COMPRESSED):
        raise SourceError(f"{path} is compressed; unpack it, for text is read from the middle too.")
    if size and source.format != "jsonl":
        refuse_missing(path, wanted_columns(source), field_names(source, path, options))
    return [_cut_bytes(path, start, size) for start in range(0, size, _PART_BYTES)]


def cut_parquet(path: str, options: Options | None = None) -> tuple[list[str], list[Part]]:
    """Columns of a Parquet file, and its parts: row groups that together have rows enough.

    Raises: SourceError when it is no whole Parquet file.
    """
    try:
        with open_file(path, options) as stream:
            file = pq.ParquetFile(stream)
            names = list(file.schema_arrow.names)
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"{path} is not a whole Parquet file ({error}); deliver it again."
        ) from None
    return names, list(_join_groups(path, sizes))


def wanted_columns(source: SourceConfig) -> list[str]:
    """Names of the source's columns that the map uses, each once."""
    return flatten_names(source.columns.values())


def flatten_names(columns: Iterable[str | tuple[str, ...]]) -> list[str]:
    """Names out of entries of a column map, each once, in order."""
    names: dict[str, None] = {}
    for column in columns:
        names.update(dict.fromkeys((column,) if isinstance(column, str) else column))
    return list(names)


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


def _cut_bytes(path: str, start: int, size: int) -> Part:
    stop = min(start + _PART_BYTES, size)
    return Part(path, start, stop, weight=(stop - start) / _PART_BYTES)


def _join_groups(path: str, sizes: Sequence[int]) -> Iterator[Part]:
    start, rows = 0, 0
    for group, size in enumerate(sizes):
        rows += size
        if rows >= _PART_ROWS or group == len(sizes) - 1:
            yield Part(path, start, group + 1, weight=rows / _PART_ROWS)
            start, rows = group + 1, 0


def field_names(source: SourceConfig, path: str, options: Options | None = None) -> list[str]:
    """Columns of a delimited text in their order. Raises: SourceError when nothing names them."""
    if source.column_names is not None:
        return list(source.column_names)
    if source.format == "movielens":
        raise SourceError(f"{path} has no header; give its `column_names`.")
    with io.BufferedReader(open_file(path, options)) as file:
        line = file.readline().decode("utf-8-sig", errors="replace")
    try:
        header = next(csv.reader([line.rstrip("\r\n")], delimiter=source.delimiter), [])
    except csv.Error as error:
        raise SourceError(f"The first line of {path} is no header of a CSV ({error}).") from None
    return [name.strip() for name in header]


def refuse_missing(path: str, wanted: Sequence[str], found: Sequence[str]) -> None:
    """Raises SourceError unless each wanted column was found, and once."""
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

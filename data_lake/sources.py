"""Raw logs as they come: which files a source has, how they are cut into parts, and how a part is
read. A part is what one task reads; text stays text here, `normalise` makes sense of it."""

import glob
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from data_lake.errors import SourceError
from data_lake.schemas import IdType

_MOVIELENS_SEPARATOR = b"::"
_UNIT_SEPARATOR = "\x1f"
_PART_BYTES = 64 * 1024 * 1024
_PART_ROWS = 1_000_000


class SourceConfig(BaseModel):
    """Files of one layout, and which of their columns are which of ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """A file, a folder (all files in it) or a pattern; may use environment variables."""
    format: Literal["parquet", "csv", "jsonl", "movielens"]
    """movielens: no header, fields apart by `::`, Latin-1."""
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
    timezone: str = "UTC"
    """IANA name; of ISO timestamps that bring no offset of their own."""


class IngestConfig(BaseModel):
    """What goes into the lake, and the shape of its tables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_id: IdType = "string"
    item_id: IdType = "string"
    num_buckets: int = Field(16, ge=1, le=4096)
    """Fixed when the tables are created; 1 to 3 million events a bucket are a good size."""
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
    columns: pa.Table
    misfits: list[str]


def list_files(source: SourceConfig, path: str) -> list[str]:
    """The files of a source in order, `path` being the expanded one.

    Raises: SourceError when there is none.
    """
    found = sorted(glob.glob(path))
    if len(found) == 1 and Path(found[0]).is_dir():
        found = sorted(str(file) for file in Path(found[0]).iterdir() if file.is_file())
    if not found:
        raise SourceError(f"There is no file {path}; check the path of the {source.format} source.")
    return found


def digest_file(path: str) -> str:
    """sha256 of a file's bytes, by which it is known again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cut_file(source: SourceConfig, path: str) -> list[Part]:
    """Parts of one file in the order of its rows. Raises: SourceError if it cannot be read."""
    if source.format == "parquet":
        return list(_cut_parquet(path))
    size = Path(path).stat().st_size
    return [
        Part(path, start, min(start + _PART_BYTES, size)) for start in range(0, size, _PART_BYTES)
    ]


def read_part(source: SourceConfig, part: Part) -> RawRows:
    """The source's columns that are mapped, of one part.

    Raises: SourceError when the file is broken or lacks a mapped column.
    """
    if source.format == "parquet":
        return _read_parquet(source, part)
    text = _read_lines(part)
    if source.format == "jsonl":
        return _read_json_lines(source, text)
    if source.format == "movielens":
        text = text.decode("latin-1").encode().replace(_MOVIELENS_SEPARATOR, b"\x1f")
    return _read_delimited(source, part, text)


def wanted_columns(source: SourceConfig) -> list[str]:
    """Names of the source's columns that the map uses, each once."""
    names: dict[str, None] = {}
    for column in source.columns.values():
        names.update(dict.fromkeys((column,) if isinstance(column, str) else column))
    return list(names)


def _cut_parquet(path: str) -> Iterator[Part]:
    try:
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(
            f"{path} is not a whole Parquet file ({error}); deliver it again."
        ) from None
    start, rows = 0, 0
    for group, size in enumerate(sizes):
        rows += size
        if rows >= _PART_ROWS or group == len(sizes) - 1:
            yield Part(path, start, group + 1)
            start, rows = group + 1, 0


def _read_parquet(source: SourceConfig, part: Part) -> RawRows:
    with pq.ParquetFile(part.path) as file:
        _check_columns(source, part.path, file.schema_arrow.names)
        try:
            groups = list(range(part.start, part.stop))
            return RawRows(file.read_row_groups(groups, columns=wanted_columns(source)), [])
        except (pa.ArrowInvalid, OSError) as error:
            raise SourceError(f"{part.path} cannot be read ({error}); deliver it again.") from None


def _read_lines(part: Part) -> bytes:
    # A line belongs to the part in which it starts.
    with open(part.path, "rb") as file:
        if part.start > 0:
            file.seek(part.start - 1)
            file.readline()
        start = file.tell()
        if start >= part.stop:
            return b""
        return file.read(part.stop - start) + file.readline()


def _read_delimited(source: SourceConfig, part: Part, text: bytes) -> RawRows:
    names = source.column_names or _header(source, part.path)
    _check_columns(source, part.path, names)
    if source.column_names is None and part.start == 0:
        text = text.partition(b"\n")[2]
    if not text.strip():
        empty = {name: pa.array([], pa.binary()) for name in wanted_columns(source)}
        return RawRows(pa.table(empty), [])

    misfits: list[str] = []

    def keep_misfit(row: pacsv.InvalidRow) -> str:
        misfits.append(str(row.text))
        return "skip"

    is_movielens = source.format == "movielens"
    table = pacsv.read_csv(
        io.BytesIO(text),
        read_options=pacsv.ReadOptions(column_names=list(names), use_threads=False),
        parse_options=pacsv.ParseOptions(
            delimiter=_UNIT_SEPARATOR if is_movielens else source.delimiter,
            quote_char=False if is_movielens else '"',
            invalid_row_handler=keep_misfit,
        ),
        convert_options=pacsv.ConvertOptions(
            column_types={name: pa.binary() for name in names},
            include_columns=wanted_columns(source),
            strings_can_be_null=True,
            null_values=[""],
            quoted_strings_can_be_null=True,
        ),
    )
    return RawRows(table, misfits)


def _header(source: SourceConfig, path: str) -> tuple[str, ...]:
    with open(path, "rb") as file:
        line = file.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n")
    return tuple(name.strip().strip('"') for name in line.split(source.delimiter))


def _read_json_lines(source: SourceConfig, text: bytes) -> RawRows:
    names, misfits = wanted_columns(source), []
    columns: dict[str, list[str | None]] = {name: [] for name in names}
    for line in text.decode("utf-8", errors="replace").splitlines():
        row = _parse_object(line)
        if row is None:
            if line.strip():
                misfits.append(line)
            continue
        for name in names:
            columns[name].append(_as_text(row.get(name)))
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    return RawRows(table, misfits)


def _parse_object(line: str) -> dict[str, object] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _as_text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def _check_columns(source: SourceConfig, path: str, found: tuple[str, ...] | list[str]) -> None:
    missing = [name for name in wanted_columns(source) if name not in found]
    if missing:
        raise SourceError(
            f"{path} has no column {', '.join(map(repr, missing))}; it has: {', '.join(found)}. "
            "Correct `columns` or `delimiter` of the source."
        )

"""How rows of the lake become the bytes of a Parquet file, and how files become rows again.

Measured on 1.5 M events: whole numbers as packed differences instead of plain or dictionary-encoded
take 20 % less space, 40 % less time to write and half the time to read. Every reader of Parquet's
second version knows the encoding (Arrow, Spark from 3.3, DuckDB, Polars, Trino).
"""

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from data_lake.storage import is_local, open_file, reaching

_UNIQUE_COLUMNS = ("event_id", "session_id", "raw")
"""Texts that hardly repeat only waste a dictionary."""
_ROWS_PER_GROUP = 2**20
_DICTIONARY = pa.dictionary(pa.int32(), pa.string())


def encode_parquet(rows: pa.Table) -> pa.Buffer:
    """The file's bytes, the same for the same rows.

    Text may come dictionary-encoded, in lists too: the file does not tell, and is read as text.
    """
    leaves = [leaf for field in rows.schema for leaf in _leaves(field.name, field.type)]
    numbers = [path for path, kind in leaves if _is_whole_number(kind)]
    repeating = [path for path, kind in leaves if not _is_whole_number(kind)]
    written = pa.BufferOutputStream()
    pq.write_table(
        rows,
        written,
        row_group_size=_ROWS_PER_GROUP,
        compression="zstd",
        compression_level=1,
        use_dictionary=[path for path in repeating if path not in _UNIQUE_COLUMNS],
        column_encoding={path: "DELTA_BINARY_PACKED" for path in numbers},
        # Nobody skips a file for the smallest of all values in all lists.
        write_statistics=[path for path, _ in leaves if "." not in path],
        # The types that Delta knows are those that Parquet knows by itself.
        store_schema=False,
    )
    return written.getvalue()


def read_files(
    files: Sequence[str],
    columns: Sequence[str] | None = None,
    options: Mapping[str, str] | None = None,
    *,
    dictionary: Sequence[str] = (),
) -> pa.Table:
    """Rows of one or more Parquet files of a table, in the order of the files.

    The columns of the files only: the partition column is not among them. A column that a file does
    not have is null in its rows, and of type null where no file has it. Text columns named in
    `dictionary`, and lists of text, come as dictionary<int32, string>, one dictionary for all
    chunks.
    """
    tables = [_read_file(uri, columns, options, dictionary) for uri in files]
    rows = pa.concat_tables(tables, promote_options="default")
    rows = _with_codes(rows, dictionary).unify_dictionaries()
    return rows if columns is None else rows.select(list(columns))


def read_in_parts(
    files: Sequence[str],
    columns: Sequence[str],
    options: Mapping[str, str] | None = None,
    *,
    num_rows: int,
) -> Iterator[pa.Table]:
    """The same rows in the same order as `read_files` gives, at most `num_rows` at a time."""
    for uri in files:
        with reaching(uri, options), open_file(uri, options) as stream:
            file = pq.ParquetFile(stream, pre_buffer=not is_local(uri))
            there = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(num_rows, columns=there):
                rows = _with_plain_text(pa.Table.from_batches([batch]))
                for name in columns:
                    if name not in there:
                        rows = rows.append_column(name, pa.nulls(rows.num_rows))
                yield rows.select(list(columns))


def _leaves(path: str, kind: pa.DataType) -> list[tuple[str, pa.DataType]]:
    """The column as Parquet names it, with its type: a list's values are `<name>.list.element`."""
    if pa.types.is_list(kind):
        return _leaves(f"{path}.list.element", kind.value_type)
    return [(path, kind)]


def _is_whole_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_timestamp(kind))


def _read_file(
    uri: str,
    columns: Sequence[str] | None,
    options: Mapping[str, str] | None,
    dictionary: Sequence[str],
) -> pa.Table:
    with reaching(uri, options), open_file(uri, options) as stream:
        metadata = pq.read_metadata(stream)
        there = metadata.schema.to_arrow_schema()
        file = pq.ParquetFile(
            stream,
            metadata=metadata,
            read_dictionary=_text_leaves(metadata, there, dictionary),
            # From a store far away the columns come all at once.
            pre_buffer=not is_local(uri),
        )
        rows = file.read([name for name in columns or there.names if name in there.names])
    rows = _with_codes(_with_plain_text(rows), dictionary)
    for name in columns or ():
        if name not in there.names:
            rows = rows.append_column(name, pa.nulls(rows.num_rows))
    return rows


def _with_plain_text(rows: pa.Table) -> pa.Table:
    """Text as `string`: files that Delta itself wrote have it of a type with few kernels."""
    return rows.cast(pa.schema([field.with_type(_plain_type(field.type)) for field in rows.schema]))


def _text_leaves(metadata: pq.FileMetaData, schema: pa.Schema, names: Sequence[str]) -> list[str]:
    """Paths of the named columns' values in the file, of those that Arrow can read as codes."""
    kinds = {field.name: field.type for field in schema if field.name in names}
    paths = [metadata.schema.column(n).path for n in range(metadata.num_columns)]
    return [
        path
        for path in paths
        for name, kind in kinds.items()
        if path == name or path.startswith(f"{name}.list.")
        if pa.types.is_string(kind.value_type if pa.types.is_list(kind) else kind)
    ]


def _with_codes(rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """The named columns with codes in place of text, and of what is null throughout."""
    fields = [
        field.with_type(_code_type(field.type)) if field.name in names else field
        for field in rows.schema
    ]
    return rows.cast(pa.schema(fields))


def _code_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_code_type(kind.value_type))
    return _DICTIONARY if pa.types.is_string(kind) or pa.types.is_null(kind) else kind


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    return pa.string() if pa.types.is_string_view(kind) else kind

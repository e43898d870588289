"""Delta tables of the lake: created once, written by many tasks, committed once a run.

A task writes Parquet files (`write_part`) and hands back what the log must say of them; one process
commits all of them together (`commit_parts`). Until then no reader sees a row.
"""

import contextlib
import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction
from pyarrow.fs import FileType, SubTreeFileSystem

from data_lake.buckets import bucket_of
from data_lake.errors import ConflictError, TableError
from data_lake.parquet import encode_parquet
from data_lake.schemas import PARTITION
from data_lake.storage import (
    delta_options,
    is_local,
    locate,
    reaching,
    write_file,
)

_NUM_BUCKETS = "nextitem.numBuckets"
_STATISTICS = ("timestamp", "user_id", "item_id")
_RULES = {
    "events": {
        "price_is_not_negative": "price IS NULL OR price >= 0",
        "quantity_is_not_negative": "quantity IS NULL OR quantity >= 0",
        "user_bucket_is_not_negative": f"{PARTITION} >= 0",
    }
}
"""Delta constraints that a table is created with: whoever writes by Delta's rules is held to them.
`commit_parts` is not, for it never looks into the files."""
_MAX_ATTEMPTS = 10


@dataclass(frozen=True)
class Part:
    """One written Parquet file, not committed yet."""

    path: str
    """Relative to the table."""
    num_rows: int
    size_bytes: int
    bucket: int | None
    written_at_ms: int
    stats: str
    """Statistics as the Delta log wants them, JSON."""

    def add_action(self) -> AddAction:
        values = {} if self.bucket is None else {PARTITION: str(self.bucket)}
        return AddAction(self.path, self.size_bytes, values, self.written_at_ms, True, self.stats)


def table_uri(lake_uri: str, name: str) -> str:
    """Where a table of the lake lies."""
    return f"{lake_uri.rstrip('/')}/{name}"


def table_exists(lake_uri: str, name: str, options: Mapping[str, str] | None = None) -> bool:
    """Whether the table was created."""
    uri = table_uri(lake_uri, name)
    with reaching(uri, options):
        return bool(DeltaTable.is_deltatable(uri, delta_options(uri, options)))


def open_table(lake_uri: str, name: str, options: Mapping[str, str] | None = None) -> DeltaTable:
    """The newest version of a table. Raises: TableError when there is none."""
    uri = table_uri(lake_uri, name)
    try:
        with reaching(uri, options):
            return DeltaTable(uri, storage_options=delta_options(uri, options))
    except TableNotFoundError:
        job = "build_sequences" if name == "sequences" else "ingest"
        raise TableError(
            f"There is no table {name!r} in {lake_uri}; run ray_jobs.{job} first."
        ) from None


def open_version(
    lake_uri: str, name: str, version: int, options: Mapping[str, str] | None = None
) -> DeltaTable:
    """A table as it was. Raises: TableError when what the version needs was deleted."""
    table = open_table(lake_uri, name, options)
    if table.version() == version:
        return table
    try:
        with reaching(table.table_uri, options):
            table.load_as_version(version)
            is_whole = _has_all_files(table, options)
    except DeltaError:
        # The log no longer reaches back so far, or was begun anew.
        is_whole = False
    if not is_whole:
        raise TableError(
            f"Version {version} of the table {name!r} can no longer be read, for a vacuum deleted "
            "what it needs; start a run of another name on the newest version, and raise "
            "maintain.retention_hours so that versions last longer."
        )
    return table


def create_table(
    lake_uri: str,
    name: str,
    schema: pa.Schema,
    options: Mapping[str, str] | None = None,
    *,
    num_buckets: int | None = None,
) -> DeltaTable:
    """Creates a table unless it exists; `num_buckets` makes it partitioned by user_bucket.

    A table that exists gets the columns of `schema` that it lacks, null in the rows that it has; no
    file is written anew, and columns beyond `schema` stay. Several processes may do so at a time.

    Raises: TableError when it exists with other ids or another number of buckets, or when a column
        that it lacks may not be null.
    """
    uri = table_uri(lake_uri, name)
    _refuse_odd(uri)
    if is_local(uri):
        filesystem, path = locate(uri)
        filesystem.create_dir(path, recursive=True)
    with reaching(uri, options):
        table = _create_or_open(uri, name, schema, options, num_buckets)
        _check_same(table, name, schema, num_buckets)
        _add_columns(table, schema)
    return table


def num_buckets_of(table: DeltaTable) -> int:
    """Into how many buckets the users of a table are spread. Raises: TableError if into none."""
    description = table.metadata().description
    number = json.loads(description).get(_NUM_BUCKETS) if description else None
    if number is None:
        raise TableError(
            f"{table.table_uri} is not bucketed by user; ingest it as a source of format 'delta'."
        )
    return int(number)


def write_part(
    lake_uri: str,
    name: str,
    rows: pa.Table,
    bucket: int | None = None,
    options: Mapping[str, str] | None = None,
) -> Part:
    """Writes rows as one Parquet file of a table, without committing it; runs anywhere.

    The partition column is left out of the file, as Delta wants it. Text may be
    dictionary-encoded, in lists too; it is read as plain text again.
    """
    folder = "" if bucket is None else f"{PARTITION}={bucket}/"
    path = f"{folder}part-{uuid.uuid4().hex}.zstd.parquet"
    if PARTITION in rows.column_names:
        rows = rows.drop_columns([PARTITION])
    content = encode_parquet(rows)
    write_file(f"{table_uri(lake_uri, name)}/{path}", content, options)
    written_at_ms = time.time_ns() // 1_000_000
    return Part(path, rows.num_rows, content.size, bucket, written_at_ms, _statistics(rows))


def commit_parts(
    table: DeltaTable,
    parts: Sequence[Part],
    *,
    removes: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
    transactions: Sequence[tuple[str, int]] = (),
) -> int:
    """Makes parts visible in one commit, and returns the table's new version.

    `removes` are URIs of files, as `files_by_bucket` gives them, that leave in the same commit.

    Raises: ConflictError when another writer removed one of the same files, or committed a
        transaction of the same name, since `table` was opened. That deltalake's own compaction
        removed one goes unnoticed.
    """
    with reaching(table.table_uri), _losing(table):
        table.create_write_transaction(
            actions=[*(part.add_action() for part in parts), *_remove_actions(table, removes)],
            mode="append",
            schema=table.schema(),
            partition_by=table.metadata().partition_columns or None,
            commit_properties=_properties(metadata or {}, transactions),
        )
        table.update_incremental()
    return int(table.version())


def has_transaction(table: DeltaTable, app_id: str) -> bool:
    """Whether a commit with this application id has landed."""
    return table.transaction_version(app_id) is not None


def last_metadata(table: DeltaTable, key: str) -> str | None:
    """The newest value of a key that `commit_parts` or `upsert` put into the log."""
    # Maintenance commits (compaction, vacuum) may stand above the one that has it.
    values = (commit[key] for commit in table.history() if key in commit)
    return next(values, None)


def files_by_bucket(table: DeltaTable) -> dict[int, list[str]]:
    """URIs of the files of each bucket that has any."""
    found: dict[int, list[str]] = {}
    for uri, file in _listed_files(table).items():
        found.setdefault(int(file[f"partition.{PARTITION}"]), []).append(uri)
    return {bucket: sorted(found[bucket]) for bucket in sorted(found)}


def count_rows(table: DeltaTable) -> int:
    """Rows of a table, as its log says; files whose number it does not say count none."""
    counts = pa.table(table.get_add_actions(flatten=True))["num_records"]
    return int(pc.sum(counts).as_py() or 0)


def bucket_files(table: DeltaTable, bucket: int) -> list[str]:
    """URIs of one bucket's files."""
    return files_by_bucket(table).get(bucket, [])


def read_table(table: DeltaTable, columns: Sequence[str] | None = None) -> pa.Table:
    """A small table as a whole, the partition column included."""
    # Through deltalake's own filesystem, threads of Arrow would call Python: a process that ends
    # soon after reading is then aborted, every second time.
    filesystem, root = locate(table.table_uri, table._storage_options)
    with reaching(table.table_uri):
        return table.to_pyarrow_table(
            columns=None if columns is None else list(columns),
            filesystem=SubTreeFileSystem(root, filesystem),
        )


def upsert(
    table: DeltaTable,
    rows: pa.Table,
    key: str,
    *,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Inserts rows, and updates those whose key is there; the last of equal keys wins.

    Columns that `rows` lacks are left as they are, null in a new row. A bucketed table gets its
    buckets here. Returns the counts of the merge.

    Raises: ConflictError when another writer changed the same rows.
    """
    rows = _last_of_each(rows, key)
    predicate = f"target.{key} = source.{key}"
    if table.metadata().partition_columns:
        buckets = pa.array(bucket_of(rows[key], num_buckets_of(table)))
        rows = rows.append_column(pa.field(PARTITION, pa.int32()), buckets)
        predicate += f" AND target.{PARTITION} = source.{PARTITION}"

    values = {name: f"source.{name}" for name in rows.column_names}
    merge = table.merge(
        rows,
        predicate=predicate,
        source_alias="source",
        target_alias="target",
        commit_properties=_properties(metadata or {}, ()),
    )
    with reaching(table.table_uri), _losing(table):
        merged = merge.when_matched_update(values).when_not_matched_insert(values).execute()
        table.update_incremental()
    return dict(merged)


def _listed_files(table: DeltaTable) -> dict[str, dict[str, Any]]:
    """What the log says of each file of a table, by the file's URI."""
    actions = pa.table(table.get_add_actions(flatten=True))
    partitions = [f"partition.{name}" for name in table.metadata().partition_columns]
    listed = actions.select(["path", "size_bytes", *partitions]).to_pylist()
    root = table.table_uri.rstrip("/")
    return {f"{root}/{file['path']}": file for file in listed}


def _has_all_files(table: DeltaTable, options: Mapping[str, str] | None) -> bool:
    filesystem, root = locate(table.table_uri, options)
    paths = [f"{root.rstrip('/')}/{unquote(f['path'])}" for f in _listed_files(table).values()]
    return all(found.type == FileType.File for found in filesystem.get_file_info(paths))


def _remove_actions(table: DeltaTable, uris: Sequence[str]) -> list[RemoveAction]:
    if not uris:
        return []
    files, now_ms = _listed_files(table), time.time_ns() // 1_000_000
    gone = [uri for uri in uris if uri not in files]
    if gone:
        # The log would take the removal of a file that is not there.
        raise ConflictError(f"{gone[0]} has left {table.table_uri} already; run this job again.")
    return [_remove_action(files[uri], now_ms) for uri in uris]


def _remove_action(file: Mapping[str, Any], now_ms: int) -> RemoveAction:
    prefix = "partition."
    values = {
        name.removeprefix(prefix): None if value is None else str(value)
        for name, value in file.items()
        if name.startswith(prefix)
    }
    # Paths are listed with % codes, which a removal gets once more.
    return RemoveAction(unquote(file["path"]), True, now_ms, file["size_bytes"], values)


def _refuse_odd(uri: str) -> None:
    """Raises TableError for a place that deltalake and Arrow would take for two different ones."""
    if "://" not in uri and re.search("%[0-9A-Fa-f]{2}", uri):
        # deltalake reads `%20` in a path as a space, and then finds nothing there.
        raise TableError(f"{uri} has a % code in its path; use a storage.root without one.")
    if not is_local(uri) and not re.fullmatch(r"\w+://[\w./@:=-]*", uri, re.ASCII):
        raise TableError(
            f"{uri} has characters that a URI writes as % codes; use a lake of plain letters, "
            "digits, `-` and `_`."
        )


def _create_or_open(
    uri: str,
    name: str,
    schema: pa.Schema,
    options: Mapping[str, str] | None,
    num_buckets: int | None,
) -> DeltaTable:
    storage_options, rules = delta_options(uri, options), _RULES.get(name, {})
    configuration = {f"delta.constraints.{rule}": sql for rule, sql in rules.items()}
    if rules:
        configuration["delta.minWriterVersion"] = "3"  # the first that knows such rules
    try:
        return DeltaTable.create(
            uri,
            schema=schema,
            mode="ignore",
            partition_by=[PARTITION] if num_buckets else None,
            description=json.dumps({_NUM_BUCKETS: num_buckets}),
            configuration=configuration,
            storage_options=storage_options,
            raise_if_key_not_exists=False,  # rules are keys of our own naming
            # A repetition would create it over that of another process, as its second version.
            commit_properties=CommitProperties(max_commit_retries=0),
        )
    except CommitFailedError:
        # Another process created it in the same moment.
        return DeltaTable(uri, storage_options=storage_options)


def _add_columns(table: DeltaTable, schema: pa.Schema) -> None:
    """Adds what the table lacks of a schema, in one commit without files."""
    for attempt in range(_MAX_ATTEMPTS):
        missing = _missing_fields(table, schema)
        if not missing:
            return
        try:
            table.alter.add_columns(list(Schema.from_arrow(pa.schema(missing)).fields))
        except CommitFailedError as error:
            # Another process may have added the same ones.
            if attempt == _MAX_ATTEMPTS - 1:
                raise _conflict(table, error) from error
        table.update_incremental()


def _missing_fields(table: DeltaTable, schema: pa.Schema) -> list[pa.Field]:
    existing = {field.name for field in table.schema().fields}
    return [field for field in schema if field.name not in existing]


@contextlib.contextmanager
def _losing(table: DeltaTable) -> Iterator[None]:
    """Names the table when a commit loses to another one."""
    try:
        yield
    except CommitFailedError as error:
        raise _conflict(table, error) from error


def _conflict(table: DeltaTable, error: CommitFailedError) -> ConflictError:
    return ConflictError(
        f"Another job changed {table.table_uri} at the same time ({error}); run this one again."
    )


def _properties(
    metadata: Mapping[str, str], transactions: Sequence[tuple[str, int]]
) -> CommitProperties:
    return CommitProperties(
        custom_metadata=dict(metadata),
        app_transactions=[Transaction(app_id, version) for app_id, version in transactions],
    )


def _last_of_each(rows: pa.Table, key: str) -> pa.Table:
    codes = pc.dictionary_encode(rows[key].combine_chunks()).indices.to_numpy(zero_copy_only=False)
    last = np.zeros(int(codes.max(initial=-1)) + 1, np.int64)
    last[codes] = np.arange(len(codes))
    return rows.take(pa.array(np.sort(last)))


def _check_same(table: DeltaTable, name: str, schema: pa.Schema, num_buckets: int | None) -> None:
    existing = pa.schema(table.schema())
    missing = [field.name for field in _missing_fields(table, schema) if not field.nullable]
    if missing:
        raise TableError(
            f"The table {name!r} has no column {', '.join(missing)}; use a new storage.root."
        )
    for column in ("user_id", "item_id"):
        if column in schema.names and existing.field(column).type != schema.field(column).type:
            raise TableError(
                f"The table {name!r} has {column} as {existing.field(column).type}, not "
                f"{schema.field(column).type}; keep its id type or use a new storage.root."
            )
    if num_buckets is not None and num_buckets_of(table) != num_buckets:
        raise TableError(
            f"The table {name!r} has {num_buckets_of(table)} buckets, not {num_buckets}; the "
            "number is fixed when a table is created."
        )


def _statistics(rows: pa.Table) -> str:
    lowest, highest, nulls = {}, {}, {}
    for name in _STATISTICS:
        if name in rows.column_names and rows.num_rows:
            bounds = pc.min_max(_distinct(rows[name])).as_py()
            lowest[name], highest[name] = _as_json(bounds["min"]), _as_json(bounds["max"])
            nulls[name] = rows[name].null_count
    return json.dumps(
        {
            "numRecords": rows.num_rows,
            "minValues": lowest,
            "maxValues": highest,
            "nullCount": nulls,
        }
    )


def _distinct(column: pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The values of a dictionary-encoded column once each; any other column as it is."""
    if not pa.types.is_dictionary(column.type):
        return column
    return pc.unique(column).cast(column.type.value_type)


def _as_json(value: Any) -> Any:
    return value.isoformat().replace("+00:00", "Z") if hasattr(value, "isoformat") else value

"""Someone else's Delta table as a source of events: the live files of its newest version."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from data_lake.errors import SourceError
from data_lake.sources import Part, SourceConfig, cut_parquet, refuse_missing, wanted_columns
from data_lake.storage import Options, is_local, locate

_NUM_THREADS = 16
"""Files that are looked into at a time; they may be far away."""
_PARTITION = "partition."


def look_at_table(
    source: SourceConfig, uri: str, options: Options | None = None
) -> tuple[str, list[Part]]:
    """By what the newest version is known again (`table id@version`), and its parts, the oldest
    file first.

    Raises: SourceError when there is no table, when it lacks a mapped column, or when its files do
        not say by themselves which rows it has.
    """
    try:
        table = DeltaTable(uri, storage_options=dict(options or {}))
    except (TableNotFoundError, DeltaError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(
            f"There is no Delta table {uri} ({reason}); check the path of the delta source."
        ) from None
    _refuse_unreadable(table, uri)
    refuse_missing(uri, wanted_columns(source), pa.schema(table.schema()).names)

    def cut(file: tuple[str, Mapping[str, Any]]) -> list[Part]:
        path, given = file
        return [replace(part, given=given) for part in cut_parquet(path, options)[1]]

    # A plain path needs none of the rules by which URIs are written.
    root = locate(uri)[1] if is_local(uri) else uri
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        parts = [part for some in pool.map(cut, _live_files(table, root)) for part in some]
    return f"{table.metadata().id}@{table.version()}", parts


def _live_files(table: DeltaTable, root: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each file, and what its partition says of all of its rows."""
    actions = pa.table(table.get_add_actions(flatten=True))
    actions = actions.sort_by([("modification_time", "ascending"), ("path", "ascending")])
    names = [name for name in actions.column_names if name.startswith(_PARTITION)]
    for action in actions.select(["path", *names]).to_pylist():
        # The log writes paths as URIs do, and may name a file that lies elsewhere.
        path = action["path"] if "://" in action["path"] else f"{root}/{unquote(action['path'])}"
        yield path, {name.removeprefix(_PARTITION): action[name] for name in names}


def _refuse_unreadable(table: DeltaTable, uri: str) -> None:
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        raise SourceError(
            f"{uri} maps the names of its columns (delta.columnMapping.mode), which is not read; "
            "write a copy of it without."
        )
    if _has_deletion_vectors(table):
        raise SourceError(
            f"{uri} marks deleted rows by deletion vectors, which are not read; rewrite its files "
            "first (REORG TABLE ... APPLY (PURGE))."
        )


def _has_deletion_vectors(table: DeltaTable) -> bool:
    if "deletionVectors" not in (table.protocol().reader_features or []):
        return False
    try:
        return bool(table.deletion_vectors().read_all().num_rows)
    except DeltaError:
        return True  # there are some, and deltalake does not read them either

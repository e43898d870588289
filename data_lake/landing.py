"""Served events that wait in the landing folder, as `serve_app` ships them: Parquet files with our
own names of columns, ids as text.

A row may come in two files when serving was killed; like every event it is taken once.
"""

from collections.abc import Collection, Sequence
from datetime import datetime

from data_lake.schemas import events_schema
from data_lake.sources import SourceConfig
from data_lake.storage import Options, delete_file, list_folder

_OURS = ("ingested_at", "arrival", "user_bucket")


def landing_source(uri: str) -> SourceConfig:
    """The folder as a source of events; nobody has to map its columns."""
    names = [name for name in events_schema("string", "string").names if name not in _OURS]
    return SourceConfig(path=uri, format="parquet", columns={name: name for name in names})


def has_landed(uri: str, options: Options | None = None) -> bool:
    """Whether a file waits there; hidden ones are still being written."""
    return any(not found.base_name.startswith(".") for found in list_folder(uri, options))


def delete_landed(
    uri: str, paths: Collection[str], before: datetime, options: Options | None = None
) -> int:
    """Deletes those of the paths that landed before a moment; returns their number."""
    old = {found.base_name for found in list_folder(uri, options) if found.mtime < before}
    gone: Sequence[str] = [path for path in paths if path.rpartition("/")[2] in old]
    for path in gone:
        delete_file(path, options)
    return len(gone)

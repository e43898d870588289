"""Upkeep of the lake: forgets users, merges small files, deletes what no version needs, and looks
for what is left.

A change of a table is one commit that puts new files in the place of old ones. It is not made by
deltalake's own `delete` and `optimize.compact` (1.6.6): `delete` writes the ids that it erases into
the log; and of two compactions at a time neither notices the other, and both write the same rows,
so that the table has them twice. Here such commits collide through an application id that they
share. A compaction by other tools at the same time would still go unnoticed: run none.

An ingest goes on beside a compaction. A commit begun before users were forgotten is refused
(ConflictError) and has to look at the table again.

Out of reach are raw files that were ingested, runs (`ranks.parquet`), serving's own history, which
has an endpoint to erase a user, and backups. A job that read before a user was forgotten may bring
the user back; `find_user` tells.
"""

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from data_lake.buckets import bucket_of
from data_lake.errors import ConflictError
from data_lake.owners import UNREADABLE, as_ids, read_owners
from data_lake.parquet import read_files
from data_lake.schemas import PARTITION
from data_lake.storage import Options, delete_file, list_folder, locate, open_file, write_file
from data_lake.tables import (
    Part,
    num_buckets_of,
    open_table,
    table_exists,
    table_uri,
    write_part,
)

TABLES = ("events", "users", "items", "sequences", "recommendations", "quarantine")
LOG_RETENTION = timedelta(days=30)
"""So long a table keeps the entries of its log, unless it was told otherwise."""

_USER_TABLES = ("events", "users", "sequences", "recommendations", "quarantine")
_REPLACED_TABLES = ("sequences", "recommendations")
_APP_ID = "maintain"
_MAX_CONFLICTS = 5
_TOMBSTONE_HOURS = 168
"""After so long a checkpoint forgets that, and when, a file was removed."""
_BOUND_LENGTH = 60
"""Writers may cut long text in statistics, but leave as much as this."""

T = TypeVar("T")
R = TypeVar("R")
RunAll = Callable[[Callable[[T], R], Sequence[T]], list[R]]
"""Calls a function once for each argument, anywhere; results in the order of the arguments."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A table, for tasks that run anywhere."""

    lake_uri: str
    name: str
    options: Mapping[str, str]

    def uri_of(self, path: str) -> str:
        return f"{table_uri(self.lake_uri, self.name)}/{path}"

    def open(self) -> DeltaTable:
        return open_table(self.lake_uri, self.name, self.options)


@dataclass(frozen=True)
class LiveFile:
    """A file of the newest version."""

    path: str
    """Relative to the table."""
    size_bytes: int
    written_at_ms: int
    bucket: int | None

    def remove_action(self, *, is_change: bool) -> RemoveAction:
        values = {} if self.bucket is None else {PARTITION: str(self.bucket)}
        now_ms = time.time_ns() // 1_000_000
        return RemoveAction(self.path, is_change, now_ms, self.size_bytes, values)


@dataclass(frozen=True)
class Replacement:
    """Old files and the one that takes their place, nothing of it committed yet."""

    removed: tuple[LiveFile, ...]
    part: Part | None
    """None when no row is left."""
    num_gone: int


@dataclass(frozen=True)
class Trace:
    """A file that holds rows of a user, or cannot be read."""

    uri: str
    is_live: bool
    """Whether the newest version has it."""
    since: datetime
    """When it was last needed: it was removed then, or written and never committed."""


def forget_users(
    lake_uri: str,
    name: str,
    user_ids: Sequence[str],
    options: Options | None = None,
    run_all: RunAll[Any, Any] | None = None,
) -> int:
    """Erases all rows of users from the newest version of a table; returns how many.

    Only files that hold such rows are rewritten, in one commit; without any there is none. Looks
    again after each commit, so that what an ingest added meanwhile goes too. Of `quarantine` every
    row goes whose text mentions the id as a word, whoever's it is: rather too many than too few.
    (Not found there: an id that the source has in pieces, or under a name that the ingest maps.)

    Raises: ConflictError when other writers win five times; ValueError for an id that does not fit.
    """
    if name not in _USER_TABLES or not user_ids:
        return 0
    place = Place(lake_uri, name, dict(options or {}))

    def find(table: DeltaTable) -> list[Replacement]:
        erase = partial(_without_users, user_ids=tuple(user_ids), place=place)
        found = (run_all or run_here)(erase, _files_of_users(table, user_ids))
        return [one for one in found if one is not None]

    return replace_files(place, find, is_change=True)


def compact(
    lake_uri: str,
    name: str,
    target_bytes: int,
    options: Options | None = None,
    run_all: RunAll[Any, Any] | None = None,
) -> None:
    """Merges the small files of each bucket into files of at most `target_bytes`, in one commit.

    Memory: the rows of one such file in each task. `sequences` and `recommendations` are left
    alone: they have one file a bucket, and a job that replaces files would not notice that they
    were merged meanwhile.

    Raises: ConflictError when other writers win five times.
    """
    if name in _REPLACED_TABLES:
        return
    place = Place(lake_uri, name, dict(options or {}))

    def find(table: DeltaTable) -> list[Replacement]:
        merge = partial(_merged, place=place)
        return (run_all or run_here)(merge, _small_files(table, target_bytes))

    replace_files(place, find, is_change=False)


def vacuum(
    lake_uri: str, name: str, retention_hours: int, options: Options | None = None
) -> list[str]:
    """Deletes files that no version of the last `retention_hours` needs; returns their paths.

    A file that the log does not know (of a run that has yet to commit, or was killed) goes when it
    was written before that.
    """
    table = open_table(lake_uri, name, options)
    return list(
        table.vacuum(
            retention_hours,
            dry_run=False,
            enforce_retention_duration=False,
            full=True,
            keep_versions=_versions_since(table, retention_hours),
        )
    )


def checkpoint(lake_uri: str, name: str, options: Options | None = None) -> None:
    """Writes the state of a table into one file of its log, and deletes entries before it that are
    older than the table's log retention (30 days).

    Transactions survive that, and so does `has_transaction`; what `last_metadata` finds may not.
    """
    table = open_table(lake_uri, name, options)
    table.create_checkpoint()
    table.cleanup_metadata()


def count_files(lake_uri: str, name: str, options: Options | None = None) -> int:
    """Files of the newest version."""
    return len(open_table(lake_uri, name, options).file_uris())


def find_user(lake_uri: str, user_id: str, options: Options | None = None) -> list[Trace]:
    """Every file in the lake that holds rows of a user, whether a version needs it or not."""
    return find_users(lake_uri, [user_id], options)[user_id]


def find_users(
    lake_uri: str,
    user_ids: Sequence[str],
    options: Options | None = None,
    run_all: RunAll[Any, Any] | None = None,
) -> dict[str, list[Trace]]:
    """Like `find_user`, for many users in one pass over all Parquet files of all tables.

    Trusts neither the log nor the buckets. A file that cannot be read counts for everyone, since
    nobody can say what it holds; it may be one that is just being written.
    """
    found: dict[str, list[Trace]] = {user_id: [] for user_id in user_ids}
    for name in TABLES:
        if table_exists(lake_uri, name, options):
            folder = table_uri(lake_uri, name)
            holders = find_in_folder(folder, user_ids, options, run_all)
            trace = _tracer(Place(lake_uri, name, dict(options or {})))
            for user_id, files in holders.items():
                found[user_id] += [trace(uri, moment) for uri, moment in files.items()]
    return found


def find_in_folder(
    folder: str,
    user_ids: Sequence[str],
    options: Options | None = None,
    run_all: RunAll[Any, Any] | None = None,
) -> dict[str, dict[str, datetime]]:
    """For each user the Parquet files below a folder that hold rows of it, or cannot be read, and
    when they were written.
    """
    search = partial(_users_in, user_ids=tuple(user_ids), options=dict(options or {}))
    files = _parquet_files(folder, options)
    holders = zip(files, (run_all or run_here)(search, list(files)), strict=True)
    found: dict[str, dict[str, datetime]] = {user_id: {} for user_id in user_ids}
    for uri, users in holders:
        for user_id in users:
            found[user_id][uri] = files[uri]
    return found


def forget_in_folder(
    folder: str,
    user_ids: Sequence[str],
    options: Options | None = None,
    run_all: RunAll[Any, Any] | None = None,
) -> int:
    """Erases all rows of users from the Parquet files below a folder, in place; returns how many.

    For what was made from the lake and is no table. At any time a file is there as a whole, old or
    new. One that cannot be read is left for `find_in_folder` to name.
    """
    erase = partial(_erase_in_place, user_ids=tuple(user_ids), options=dict(options or {}))
    return sum((run_all or run_here)(erase, list(_parquet_files(folder, options))))


def find_in_log(
    lake_uri: str, user_ids: Sequence[str], options: Options | None = None
) -> dict[str, datetime]:
    """For users whom an entry of a log names: when a checkpoint summed that entry up, or when it
    was written if none has. `checkpoint` deletes the entry when that is `LOG_RETENTION` ago.

    The log keeps the smallest and the largest user_id of every file, so it may name a user whose
    rows are gone. (A predicate of a DELETE by other tools is not looked at.)
    """
    bounds = {user_id[:_BOUND_LENGTH]: user_id for user_id in user_ids}
    newest: dict[str, datetime] = {}
    for name in _USER_TABLES:
        place = Place(lake_uri, name, dict(options or {}))
        files = _log_files(place)
        sums = sorted(moment for uri, moment in files.items() if uri.endswith(".parquet"))
        for uri, written_at in files.items():
            moment = next((one for one in sums if one >= written_at), written_at)
            for user_id in {bounds[text] for text in _bounds_in(uri, options) if text in bounds}:
                newest[user_id] = max(moment, newest.get(user_id, moment))
    return newest


def run_here(function: Callable[[T], R], arguments: Sequence[T]) -> list[R]:
    """The `RunAll` of one process."""
    return [function(argument) for argument in arguments]


def replace_files(
    place: Place,
    find: Callable[[DeltaTable], list[Replacement]],
    *,
    is_change: bool,
    app_ids: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Finds and commits replacements until there are none; returns how many rows are gone.

    Args:
        app_ids: of transactions, beside our own, that a commit is told apart by.
        metadata: what the log says of each commit.

    Raises: ConflictError when other writers win five times.
    """
    num_gone = num_conflicts = 0
    while num_conflicts < _MAX_CONFLICTS:
        table = place.open()
        replacements = find(table)
        if not replacements:
            return num_gone
        try:
            _commit(table, replacements, app_ids, metadata, is_change=is_change)
        except CommitFailedError as error:
            log.info("%s: %s", place.name, error)
            num_conflicts += 1
            _discard(place, replacements)
        else:
            num_gone += sum(one.num_gone for one in replacements)
    raise ConflictError(
        f"Other jobs changed {place.uri_of('')} {num_conflicts} times meanwhile; run this one "
        "again when they are done."
    )


def _commit(
    table: DeltaTable,
    replacements: Sequence[Replacement],
    app_ids: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
    *,
    is_change: bool,
) -> None:
    now_us = time.time_ns() // 1_000
    removed = [
        file.remove_action(is_change=is_change) for one in replacements for file in one.removed
    ]
    added: list[AddAction] = [
        replace(one.part.add_action(), data_change=is_change) for one in replacements if one.part
    ]
    table.create_write_transaction(
        actions=[*removed, *added],
        mode="append",
        schema=table.schema(),
        partition_by=table.metadata().partition_columns or None,
        commit_properties=CommitProperties(
            custom_metadata=dict(metadata or {}),
            # Of two at a time, which would both write the rows of the same files, one loses.
            app_transactions=[Transaction(app_id, now_us) for app_id in (_APP_ID, *app_ids)],
        ),
    )


def _discard(place: Place, replacements: Sequence[Replacement]) -> None:
    for one in replacements:
        if one.part is not None:
            delete_file(place.uri_of(one.part.path), place.options)


def live_files(table: DeltaTable) -> list[LiveFile]:
    """In order of bucket and time, so that merged rows stand in order of arrival."""
    actions = pa.table(table.get_add_actions(flatten=True))
    partition = f"partition.{PARTITION}"
    files = [
        LiveFile(
            unquote(action["path"]),
            action["size_bytes"],
            action["modification_time"],
            action.get(partition),
        )
        for action in actions.to_pylist()
    ]
    return sorted(files, key=lambda file: (file.bucket or 0, file.written_at_ms, file.path))


def _files_of_users(table: DeltaTable, user_ids: Sequence[str]) -> list[LiveFile]:
    """Files that may hold rows of users: those of their buckets, or all of a table without."""
    files = live_files(table)
    if not table.metadata().partition_columns:
        return files
    ids = as_ids(user_ids, pa.schema(table.schema()).field("user_id").type)
    buckets = set(bucket_of(ids, num_buckets_of(table)).tolist())
    return [file for file in files if file.bucket in buckets]


def _small_files(table: DeltaTable, target_bytes: int) -> list[tuple[LiveFile, ...]]:
    """Files that fit into one, of the same bucket and next to each other in time."""
    groups: list[list[LiveFile]] = []
    size = 0
    for file in live_files(table):
        size += file.size_bytes
        if groups and groups[-1][0].bucket == file.bucket and size <= target_bytes:
            groups[-1].append(file)
        else:
            groups.append([file])
            size = file.size_bytes
    return [tuple(group) for group in groups if len(group) > 1]


def _without_users(
    file: LiveFile, *, user_ids: tuple[str, ...], place: Place
) -> Replacement | None:
    """The file without the rows of users; None if it has none."""
    uri = place.uri_of(file.path)
    with open_file(uri, place.options) as stream:
        is_gone = read_owners(stream).mask(user_ids)
    if not is_gone.any():
        return None
    kept = read_files([uri], options=place.options).filter(pa.array(~is_gone))
    return Replacement((file,), write_rest(kept, file.bucket, place), int(is_gone.sum()))


def _merged(files: tuple[LiveFile, ...], *, place: Place) -> Replacement:
    rows = read_files([place.uri_of(file.path) for file in files], options=place.options)
    return Replacement(files, write_rest(rows, files[0].bucket, place), 0)


def write_rest(rows: pa.Table, bucket: int | None, place: Place) -> Part | None:
    if not rows.num_rows:
        return None
    return write_part(place.lake_uri, place.name, rows, bucket, place.options)


def _erase_in_place(uri: str, *, user_ids: tuple[str, ...], options: Options) -> int:
    try:
        with open_file(uri, options) as stream:
            is_gone = read_owners(stream).mask(user_ids)
            if not is_gone.any():
                return 0
            kept = pq.ParquetFile(stream).read().filter(pa.array(~is_gone))
    except UNREADABLE:
        return 0
    content = pa.BufferOutputStream()
    pq.write_table(kept, content)
    # Not *.parquet, so that nobody takes it for one of the files.
    temporary = f"{uri}.{uuid.uuid4().hex}.tmp"
    write_file(temporary, content.getvalue(), options)
    filesystem, path = locate(uri, options)
    filesystem.move(locate(temporary, options)[1], path)
    return int(is_gone.sum())


def _users_in(uri: str, *, user_ids: tuple[str, ...], options: Options) -> list[str]:
    """Which of the users a file holds rows of."""
    try:
        with open_file(uri, options) as stream:
            return read_owners(stream).among(user_ids)
    except FileNotFoundError:
        return []  # deleted since it was listed
    except UNREADABLE:
        return list(user_ids)


def _versions_since(table: DeltaTable, hours: int) -> list[int] | None:
    """Versions that were the newest one within the last hours, where checkpoints no longer tell
    which files they need.
    """
    if hours <= _TOMBSTONE_HOURS:
        return None
    oldest_ms = (time.time() - hours * 3600) * 1000
    commits = table.history()  # newest first
    replaced_at = [float("inf"), *(commit["timestamp"] for commit in commits[:-1])]
    return [
        commit["version"]
        for commit, moment in zip(commits, replaced_at, strict=True)
        if moment >= oldest_ms
    ]


def _tracer(place: Place) -> Callable[[str, datetime], Trace]:
    """Turns the URI of a file of a table, and when it was written, into a trace."""
    live = {place.uri_of(file.path) for file in live_files(place.open())}
    removed_at: dict[str, datetime] = {}
    for log_file in _log_files(place):
        for action in _read_actions(log_file, place.options):
            removed = action.get("remove")
            if removed:
                moment = datetime.fromtimestamp(removed["deletionTimestamp"] / 1000, UTC)
                removed_at[place.uri_of(unquote(removed["path"]))] = moment
    return lambda uri, written_at: Trace(uri, uri in live, removed_at.get(uri, written_at))


def _bounds_in(uri: str, options: Options | None) -> set[str]:
    """The smallest and largest user ids of the files that an entry of a log adds, perhaps cut."""
    bounds = set()
    for action in _read_actions(uri, options):
        stats = json.loads((action.get("add") or {}).get("stats") or "{}")
        for side in ("minValues", "maxValues"):
            bounds.add(str(stats.get(side, {}).get("user_id"))[:_BOUND_LENGTH])
    return bounds


def _read_actions(uri: str, options: Options | None) -> Iterator[dict[str, Any]]:
    """Files that an entry of a log, or a checkpoint, adds and removes."""
    with open_file(uri, options) as stream:
        if uri.endswith(".parquet"):
            columns = ["add.stats", "remove.path", "remove.deletionTimestamp"]
            yield from pq.ParquetFile(stream).read(columns).to_pylist()
        else:
            lines = stream.read().split(b"\n")
            yield from (json.loads(line) for line in lines if line)


def _log_files(place: Place) -> dict[str, datetime]:
    files = _files_below(place.uri_of("_delta_log"), place.options)
    endings = (".json", ".checkpoint.parquet")
    return {uri: moment for uri, moment in files.items() if uri.endswith(endings)}


def _parquet_files(folder: str, options: Options | None) -> dict[str, datetime]:
    files = _files_below(folder, options)
    return {
        uri: moment
        for uri, moment in files.items()
        if uri.endswith(".parquet") and "/_delta_log/" not in uri
    }


def _files_below(folder: str, options: Options | None) -> dict[str, datetime]:
    """URIs of all files below a folder, and when each was written."""
    root = locate(folder, options)[1].rstrip("/")
    return {
        f"{folder}{file.path.removeprefix(root)}": file.mtime
        for file in list_folder(folder, options)
    }

"""Takes the rows of files that were ingested out of the lake again.

An ingest notes in the logs of `events` and `quarantine` which files it read; a row says by
`ingested_at` in which run it came, and then by `arrival` (events) or `source` (quarantine) with
which file. Notes last as long as the log does (30 days), and begin with the version that first
wrote them.

What this cannot do: items and users are updated in place, so what a file changed there stays until
a later one changes it. An event that came with several files is known by the first; where that one
is withdrawn the event goes, though another file had it too.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from numpy.typing import NDArray

from data_lake.ingest import ROWS_OF_A_PART
from data_lake.maintenance import (
    LiveFile,
    Place,
    Replacement,
    RunAll,
    live_files,
    replace_files,
    run_here,
    write_rest,
)
from data_lake.parquet import read_files
from data_lake.storage import Options
from data_lake.tables import table_exists

TABLES = ("quarantine", "events")
"""In this order: while events are there the work is not done."""
WITHDRAWN = "withdraw"
"""Application id of the commits that take rows out."""
NOTE = "nextitem.files"
"""Key of the note in a commit."""
_WITHDRAWN_NOTE = "nextitem.withdrawn"
_CLOCKS_DIFFER_MS = 86_400_000
"""At most: of the machine that began a run and of those that wrote its files."""


@dataclass(frozen=True)
class Delivery:
    """A file that an ingest run read."""

    path: str
    """Of the file, the Delta table, or the folder where served events land."""
    digest: str
    """By which its bytes are known again; empty for a folder."""
    first_part: int
    num_parts: int
    """Places of its parts among all of the run."""
    ingested_us: int
    """When the run began, which `ingested_at` of its rows says: microseconds in UTC."""
    version: int = 0
    """Of the table, whose log has the note."""

    @property
    def ingested_at(self) -> datetime:
        """When the run began, to the microsecond."""
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=self.ingested_us)

    def facts(self) -> dict[str, Any]:
        """For a person, as JSON."""
        return {"file": self.path, "run": self.ingested_at.isoformat(), "digest": self.digest[:12]}


def write_note(deliveries: Iterable[Delivery], num_duplicates: int = 0) -> dict[str, str]:
    """What a commit says of the files that its rows came with, as metadata."""
    files = [asdict(one) for one in deliveries]
    for file in files:
        del file["version"]
    return {NOTE: json.dumps({"files": files, "duplicates": num_duplicates})}


def read_deliveries(table: DeltaTable) -> list[Delivery]:
    """Every file that the log of a table has a note of, those of the newest run first."""
    return [
        Delivery(**file, version=version)
        for version, note in _notes(table)
        for file in note["files"]
    ]


def count_duplicates_since(table: DeltaTable, withdrawn: Sequence[Delivery]) -> int:
    """Rows that later runs left out as known: some may be known by what is withdrawn, and are
    missing then.
    """
    chosen = {one.version for one in withdrawn}
    first = min(chosen, default=table.version())
    later = (note for version, note in _notes(table) if version > first and version not in chosen)
    return sum(note["duplicates"] for note in later)


def withdraw(
    lake_uri: str,
    name: str,
    deliveries: Sequence[Delivery],
    options: Options | None = None,
    run_all: RunAll[Any, Any] | None = None,
) -> int:
    """Takes all rows of some deliveries out of a table of `TABLES`; returns how many.

    One commit rewrites the files that hold such rows; what others add meanwhile stays. Without any
    such row there is no commit, so that it may be run again.

    Raises: ConflictError when other writers win five times.
    """
    if not deliveries or not table_exists(lake_uri, name, options):
        return 0
    place = Place(lake_uri, name, dict(options or {}))
    take_out = partial(_without, deliveries=tuple(deliveries), place=place)

    def find(table: DeltaTable) -> list[Replacement]:
        files = _files_since(table, deliveries)
        return [one for one in (run_all or run_here)(take_out, files) if one is not None]

    told = json.dumps([one.facts() for one in deliveries])
    metadata = {_WITHDRAWN_NOTE: told}
    return replace_files(place, find, is_change=True, app_ids=(WITHDRAWN,), metadata=metadata)


def count_delivered(
    lake_uri: str,
    name: str,
    deliveries: Sequence[Delivery],
    options: Options | None = None,
    run_all: RunAll[Any, Any] | None = None,
) -> int:
    """Rows of some deliveries that a table holds now, which `withdraw` would take out."""
    if not deliveries or not table_exists(lake_uri, name, options):
        return 0
    place = Place(lake_uri, name, dict(options or {}))
    count = partial(_count, deliveries=tuple(deliveries), place=place)
    return sum((run_all or run_here)(count, _files_since(place.open(), deliveries)))


def _notes(table: DeltaTable) -> list[tuple[int, dict[str, Any]]]:
    """Version and note of each commit that has one, the newest first."""
    commits = (commit for commit in table.history() if NOTE in commit)
    return [(commit["version"], json.loads(commit[NOTE])) for commit in commits]


def _files_since(table: DeltaTable, deliveries: Sequence[Delivery]) -> list[LiveFile]:
    """Files that were written since the first of the runs began."""
    first_ms = min(one.ingested_us for one in deliveries) // 1000 - _CLOCKS_DIFFER_MS
    return [file for file in live_files(table) if file.written_at_ms >= first_ms]


def _without(
    file: LiveFile, *, deliveries: tuple[Delivery, ...], place: Place
) -> Replacement | None:
    """The file without the rows of deliveries; None if it has none."""
    is_gone = _find_rows(file, deliveries, place)
    if not is_gone.any():
        return None
    rest = read_files([place.uri_of(file.path)], options=place.options).filter(pa.array(~is_gone))
    return Replacement((file,), write_rest(rest, file.bucket, place), int(is_gone.sum()))


def _count(file: LiveFile, *, deliveries: tuple[Delivery, ...], place: Place) -> int:
    return int(_find_rows(file, deliveries, place).sum())


def _find_rows(file: LiveFile, deliveries: Sequence[Delivery], place: Place) -> NDArray[np.bool_]:
    """Which rows of a file came with one of the deliveries, `[rows]`."""
    of_file = "arrival" if place.name == "events" else "source"
    rows = read_files([place.uri_of(file.path)], ["ingested_at", of_file], place.options)
    runs = rows["ingested_at"].cast(pa.int64()).to_numpy()
    is_found = np.zeros(len(runs), bool)
    for run, some in _by_run(deliveries).items():
        places = np.flatnonzero(runs == run)
        if len(places):
            few = rows[of_file].take(pa.array(places))
            is_found[places] = _is_of(few, some)
    return is_found


def _is_of(column: pa.ChunkedArray, deliveries: Sequence[Delivery]) -> NDArray[np.bool_]:
    """Which rows of one run came with one of its deliveries, by their arrival or their source."""
    if pa.types.is_integer(column.type):
        parts = [range(one.first_part, one.first_part + one.num_parts) for one in deliveries]
        wanted = [part for some in parts for part in some]
        return np.isin(column.to_numpy() // ROWS_OF_A_PART, wanted)
    is_found = np.zeros(len(column), bool)
    for path in {one.path for one in deliveries}:
        # Files of a table, or of the landing folder, lie below it.
        is_below = pc.starts_with(column, f"{path.rstrip('/')}/")
        is_found |= np.asarray(pc.or_(pc.equal(column, path), is_below), bool)
    return is_found


def _by_run(deliveries: Iterable[Delivery]) -> Mapping[int, list[Delivery]]:
    found: dict[int, list[Delivery]] = {}
    for one in deliveries:
        found.setdefault(one.ingested_us, []).append(one)
    return found

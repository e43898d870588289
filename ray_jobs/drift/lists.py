"""The lists that visitors were shown, from the log that the endpoint writes: read where it lies, in
files that are pruned by the time in their names, and sorted by the bucket of their user.

They do not go through the lake: a list is needed once, by its time, and the log is Parquet already.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_lake.buckets import bucket_of, hash_ids
from data_lake.errors import SourceError
from data_lake.storage import list_folder, open_file, reaching
from ray_jobs.drift.axes import DAY_US, Periods, group_of
from ray_jobs.drift.items import microseconds, parse_ids

_COLUMNS = ("user_id", "session_id", "timestamp", "model_version", "item_ids", "top_score")
_BYTES_PER_TASK = 64 * 2**20
_SAMPLED_SCORES = 2_000
_NUM_DECILES = 10


@dataclass(frozen=True)
class ListsPlan:
    """What all files of the log have in common."""

    periods: Periods
    version: str
    """That serves; scores of another one mean something else."""
    user_type: pa.DataType
    num_buckets: int
    options: Mapping[str, str]


def find_files(uri: str, periods: Periods, options: Mapping[str, str]) -> list[list[str]]:
    """Files that may hold lists of either period, in tasks of bounded size; none without a log."""
    # A name tells the time of the first row; the last one is seconds later, unless the store could
    # not be written for long.
    first_us, last_us = periods.first_us - DAY_US, periods.current_until_us
    tasks: list[list[str]] = []
    size = 0
    for found in sorted(list_folder(uri, options), key=lambda file: file.base_name):
        name = re.fullmatch(r"exposures-(\d+)-\w+\.parquet", found.base_name)
        if name is None or not first_us <= int(name[1]) < last_us:
            continue
        if not tasks or size + found.size > _BYTES_PER_TASK:
            tasks.append([])
            size = 0
        tasks[-1].append(f"{uri}/{found.base_name}")
        size += found.size
    return tasks


def split_lists(files: Sequence[str], plan: ListsPlan) -> Iterator[pa.Table | np.ndarray]:
    """The lists of each bucket of users; those of nobody who is known by a user id; hashes of the
    sessions of these; and a sample of the scores of the reference period.

    Tables have user_id, session_id, group, time_us, item_ids (text) and score (NaN where it is not
    comparable). Raises: SourceError for a file that cannot be read.
    """
    rows = pa.concat_tables([_read(file, plan) for file in files])
    times_us = microseconds(rows["timestamp"])
    slots = plan.periods.slot_of(times_us)
    rows, times_us, slots = (
        rows.filter(pa.array(slots >= 0)),
        times_us[slots >= 0],
        slots[slots >= 0],
    )
    shown, bucket = _prepare(rows, times_us, plan)

    order = np.argsort(bucket, kind="stable")
    edges = np.searchsorted(bucket[order], np.arange(plan.num_buckets + 2))
    ordered = shown.take(pa.array(order))
    for start, stop in pairwise(edges):
        yield ordered.slice(start, stop - start)
    of_sessions = ordered["session_id"].slice(edges[-2])
    yield np.unique(hash_ids(of_sessions.drop_null()))
    scores = shown["score"].to_numpy()
    is_reference = (slots < plan.periods.num_slots - 1) & ~np.isnan(scores)
    yield scores[is_reference][:_SAMPLED_SCORES]


def join_sessions(*hashes: np.ndarray) -> np.ndarray:
    """Hashes of sessions of all files of the log, ascending."""
    joined: np.ndarray = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))
    return joined


def find_score_edges(samples: Sequence[np.ndarray]) -> tuple[float, ...]:
    """Distinct deciles of the scores; none where there are fewer scores than deciles."""
    scores = np.concatenate([*samples, np.empty(0)])
    if len(scores) < _NUM_DECILES:
        return ()
    inner = np.arange(1, _NUM_DECILES) / _NUM_DECILES
    return tuple(np.unique(np.quantile(scores, inner)).tolist())


def _prepare(rows: pa.Table, times_us: np.ndarray, plan: ListsPlan) -> tuple[pa.Table, np.ndarray]:
    """The columns of `split_lists`, and the bucket of each row."""
    texts, sessions = (rows[name].combine_chunks() for name in ("user_id", "session_id"))
    users = parse_ids(texts, plan.user_type)
    is_user = np.asarray(pc.is_valid(users), bool)
    visitor = pc.coalesce(sessions, texts, pa.scalar(""))
    group, bucket = group_of(visitor), np.full(len(users), plan.num_buckets)
    # The same group as in the events of the user, whatever their id is there.
    known = users.filter(pa.array(is_user))
    if len(known):
        group[is_user], bucket[is_user] = group_of(known), bucket_of(known, plan.num_buckets)
    is_ours = np.asarray(pc.equal(rows["model_version"], plan.version), bool)
    score = rows["top_score"].cast(pa.float64()).to_numpy()
    columns = {
        "user_id": users,
        "session_id": sessions,
        "group": group,
        "time_us": times_us,
        "item_ids": rows["item_ids"].combine_chunks(),
        "score": np.where(is_ours, score, np.nan),
    }
    return pa.table(columns), bucket


def _read(uri: str, plan: ListsPlan) -> pa.Table:
    try:
        with reaching(uri, plan.options), open_file(uri, plan.options) as stream:
            file = pq.ParquetFile(stream)
            names = file.schema_arrow.names
            rows = file.read([name for name in _COLUMNS if name in names])
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"{uri} cannot be read as a log of lists ({error}); move it out of the folder."
        ) from None
    if "top_score" not in rows.column_names:
        # Logs of earlier versions of the endpoint have none.
        rows = rows.append_column("top_score", pa.nulls(rows.num_rows, pa.float64()))
    return rows.select(_COLUMNS)

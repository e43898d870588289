"""The log of lists: which files, which rows, and to whom they belong."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest

from data_lake.buckets import bucket_of, hash_ids
from data_lake.errors import SourceError
from ray_jobs.drift.axes import DAY_US, Periods, group_of
from ray_jobs.drift.lists import find_files, find_score_edges, join_sessions, split_lists
from serve_app.exposures import SCHEMA
from tests.ray_jobs.drift.toys import exposure, lists_plan, write_log


def test_files_are_pruned_by_the_time_in_their_names(tmp_path):
    for day in (-3, 0, 2, 3, 5):
        write_log(tmp_path, f"exposures-{max(0, day) * DAY_US}-{'ab' * 16}.parquet", [])
    (tmp_path / ".exposures-0-ab.parquet").touch()
    (tmp_path / "notes.txt").touch()
    (found,) = find_files(str(tmp_path), Periods(4 * DAY_US, 5 * DAY_US, 2, 1), {})
    assert [path.rpartition("/")[2].split("-")[1] for path in found] == [
        str(day * DAY_US) for day in (2, 3)
    ]
    assert find_files(str(tmp_path / "nothing"), Periods(0, 9, 2, 1), {}) == []


def test_lists_go_to_the_bucket_of_their_user(tmp_path):
    at = datetime(1970, 1, 1, 12, tzinfo=UTC)
    rows = [
        exposure("7", at, ["a"], top_score=0.5),
        exposure("guest", at, ["b"], top_score=0.7),
        exposure(None, at, ["c"], session_id="s1", model_version="v0", top_score=0.9),
        exposure("8", at + timedelta(days=30), ["d"]),
    ]
    path = write_log(tmp_path, "exposures-0-ab.parquet", rows)
    *pieces, sessions, scores = split_lists([path], lists_plan())
    (bucket,) = bucket_of(pa.array([7]), 3)
    assert [piece.num_rows for piece in pieces] == [*(int(n == bucket) for n in range(3)), 2]
    assert pieces[bucket]["group"].to_pylist() == group_of(pa.array([7])).tolist()
    # Nobody of these is known by a user id; one has a session, by which events may answer.
    assert pieces[3]["user_id"].to_pylist() == [None, None]
    assert pieces[3]["session_id"].to_pylist() == [None, "s1"]
    assert pieces[3]["group"].to_pylist() == group_of(pa.array(["guest", "s1"])).tolist()
    assert sessions.tolist() == hash_ids(pa.array(["s1"])).tolist()
    # Scores of another version mean something else.
    np.testing.assert_array_equal(pieces[3]["score"], [0.7, np.nan])
    assert sorted(scores) == [0.5, 0.7]


def test_logs_without_scores_are_read(tmp_path):
    at = datetime(1970, 1, 1, tzinfo=UTC)
    schema = SCHEMA.remove(SCHEMA.get_field_index("top_score"))
    path = write_log(tmp_path, "exposures-0-ab.parquet", [exposure("u7", at, ["a"])], schema)
    *pieces, _, scores = split_lists([path], lists_plan(pa.string()))
    assert sum(piece.num_rows for piece in pieces) == 1
    assert len(scores) == 0
    assert find_score_edges([scores]) == ()


def test_a_log_that_is_no_log_is_named(tmp_path):
    path = tmp_path / "exposures-0-ab.parquet"
    path.write_text("lists")
    with pytest.raises(SourceError, match=r"exposures-0-ab\.parquet cannot be read as a log"):
        list(split_lists([str(path)], lists_plan()))


def test_deciles_cut_scores_into_equal_parts():
    edges = find_score_edges([np.arange(50.0), np.arange(50.0, 101)])
    assert edges == pytest.approx(tuple(range(10, 100, 10)))
    assert find_score_edges([np.ones(100)]) == (1.0,)


def test_sessions_of_several_files_are_each_known_once():
    first, second = np.array([5, 9], np.uint64), np.array([2, 5], np.uint64)
    assert join_sessions(first, second).tolist() == [2, 5, 9]
    assert join_sessions().tolist() == []

"""Users of a bucket, few at a time."""

import pyarrow as pa
import pytest

from data_lake.parquet import read_files, read_in_parts
from data_lake.schemas import sequences_schema
from data_lake.tables import commit_parts, create_table, files_by_bucket, open_table, write_part
from ray_jobs import users_reader
from ray_jobs.users_reader import LISTS, Bucket, read_users

COLUMNS = ["user_id", "segment", *LISTS]


def write_users(lake, first, lengths):
    """Sequences of so many events, in a file of their own."""
    rows = pa.table(
        {
            "user_id": range(first, first + len(lengths)),
            "segment": pa.nulls(len(lengths), pa.string()),
            "item_ids": [[f"i{n}" for n in range(length)] for length in lengths],
            "event_types": [["view"] * length for length in lengths],
            "timestamps": pa.array(
                [list(range(length)) for length in lengths], pa.list_(pa.timestamp("us", "UTC"))
            ),
            "devices": pa.array([[None] * length for length in lengths], pa.list_(pa.string())),
        }
    )
    return write_part(lake, "sequences", rows, 0)


@pytest.fixture
def files(tmp_path):
    """Two files of one bucket: five users and two."""
    lake = str(tmp_path)
    table = create_table(lake, "sequences", sequences_schema("int64", "string"), num_buckets=1)
    commit_parts(table, [write_users(lake, 0, [1, 2, 3, 4, 5]), write_users(lake, 5, [7, 1])])
    return files_by_bucket(open_table(lake, "sequences"))[0]


@pytest.mark.parametrize("num_rows", [1, 2, 100])
def test_parts_are_the_whole(files, num_rows):
    columns = [*COLUMNS, "not there"]
    parts = list(read_in_parts(files, columns, num_rows=num_rows))
    assert max(part.num_rows for part in parts) <= num_rows
    assert pa.concat_tables(parts).equals(read_files(files, columns))


def test_no_more_users_come_at_a_time_and_each_with_the_last_events(files, monkeypatch):
    monkeypatch.setattr(users_reader, "USERS_AT_ONCE", 3)
    parts = list(read_users(Bucket(0, files, [], []), pa.int64(), 2, {}))
    rows = [row for part in parts for row in part.to_pylist()]
    assert max(part.num_rows for part in parts) <= 3
    assert sorted(row["user_id"] for row in rows) == list(range(7))
    assert {row["user_id"]: row["item_ids"] for row in rows} == {
        0: ["i0"],
        1: ["i0", "i1"],
        2: ["i1", "i2"],
        3: ["i2", "i3"],
        4: ["i3", "i4"],
        5: ["i5", "i6"],
        6: ["i0"],
    }


def test_who_has_no_sequence_comes_with_empty_lists(files, monkeypatch, tmp_path):
    monkeypatch.setattr(users_reader, "USERS_AT_ONCE", 3)
    names = pa.table(
        {"user_id": [3, 10, 11, 12, 13], "segment": [None, "new", None, "loyal", "new"]}
    )
    part = write_part(str(tmp_path), "users", names, 0)
    users = [f"{tmp_path}/users/{part.path}"]
    parts = list(read_users(Bucket(0, files, users, []), pa.int64(), 2, {}))
    new = [row for part in parts for row in part.to_pylist() if row["user_id"] >= 10]
    assert {row["user_id"]: row["segment"] for row in new} == {
        10: "new",
        11: None,
        12: "loyal",
        13: "new",
    }
    assert all(row[name] == [] for row in new for name in LISTS)
    assert max(part.num_rows for part in parts) <= 3

import json
import pickle
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_lake.buckets import bucket_of
from data_lake.errors import ConflictError, TableError
from data_lake.schemas import TIMESTAMP, items_schema, quarantine_schema, users_schema
from data_lake.tables import (
    bucket_files,
    commit_parts,
    create_table,
    files_by_bucket,
    has_transaction,
    last_metadata,
    num_buckets_of,
    open_table,
    read_files,
    read_table,
    table_exists,
    table_uri,
    upsert,
    write_part,
)


@pytest.fixture
def lake(tmp_path):
    return str(tmp_path / "a lake")  # a space must not hurt


def some_users(*user_ids, segment="new"):
    """Rows for bucket files, as a task would write them."""
    rows = [{"user_id": user_id, "segment": segment, "signup_at": None} for user_id in user_ids]
    schema = users_schema("int64")
    return pa.Table.from_pylist(rows, schema.remove(schema.get_field_index("user_bucket")))


def create_users(lake, num_buckets=4):
    return create_table(lake, "users", users_schema("int64"), num_buckets=num_buckets)


def test_a_missing_table_says_which_job_makes_it(lake):
    assert not table_exists(lake, "events")
    with pytest.raises(TableError, match=r"no table 'events' .* run ray_jobs\.ingest first"):
        open_table(lake, "events")
    with pytest.raises(TableError, match=r"run ray_jobs\.build_sequences first"):
        open_table(lake, "sequences")


def test_creating_twice_is_creating_once(lake):
    create_users(lake)
    assert create_users(lake).version() == 0
    assert table_exists(lake, "users")
    assert num_buckets_of(open_table(lake, "users")) == 4


def test_another_number_of_buckets_is_refused(lake):
    create_users(lake)
    with pytest.raises(TableError, match="has 4 buckets, not 8"):
        create_users(lake, num_buckets=8)


def test_another_type_of_id_is_refused(lake):
    create_users(lake)
    with pytest.raises(TableError, match="has user_id as int64, not string"):
        create_table(lake, "users", users_schema("string"), num_buckets=4)


def test_a_table_without_buckets_says_so(lake):
    table = create_table(lake, "quarantine", quarantine_schema())
    with pytest.raises(TableError, match="not bucketed"):
        num_buckets_of(table)


def test_a_part_is_unseen_until_it_is_committed(lake):
    table = create_users(lake)
    part = pickle.loads(pickle.dumps(write_part(lake, "users", some_users(1, 2), 3)))
    assert read_table(open_table(lake, "users")).num_rows == 0
    assert commit_parts(table, [part]) == 1
    rows = read_table(open_table(lake, "users")).to_pylist()
    assert [(row["user_id"], row["user_bucket"]) for row in rows] == [(1, 3), (2, 3)]


def test_the_file_of_a_part_lacks_the_partition_column(lake):
    create_users(lake)
    rows = some_users(1).append_column("user_bucket", pa.array([3], pa.int32()))
    part = write_part(lake, "users", rows, 3)
    file = pq.ParquetFile(f"{table_uri(lake, 'users')}/{part.path}")
    assert file.schema_arrow.names == ["user_id", "segment", "signup_at"]
    assert part.path.startswith("user_bucket=3/")


def test_statistics_of_a_part_bound_its_values(lake):
    moments = [datetime(2025, 1, 2, 3, 4, 5, 6, UTC), datetime(2024, 1, 1, tzinfo=UTC)]
    rows = pa.table({"user_id": [7, 5], "timestamp": pa.array(moments, TIMESTAMP)})
    stats = json.loads(write_part(lake, "events", rows, 0).stats)
    assert stats["numRecords"] == 2
    assert stats["minValues"] == {"timestamp": "2024-01-01T00:00:00Z", "user_id": 5}
    assert stats["maxValues"] == {"timestamp": "2025-01-02T03:04:05.000006Z", "user_id": 7}


def test_a_filter_by_a_statistic_finds_the_rows(lake):
    table = create_users(lake)
    parts = [write_part(lake, "users", some_users(n), n) for n in (1, 2)]
    commit_parts(table, parts)
    rows = open_table(lake, "users").to_pyarrow_table(filters=[("user_id", "=", 2)])
    assert rows["user_id"].to_pylist() == [2]


def test_many_parts_land_in_one_commit_with_its_transactions(lake):
    table = create_users(lake)
    parts = [write_part(lake, "users", some_users(n), n) for n in (0, 1)]
    commit_parts(table, parts, metadata={"why": "a test"}, transactions=[("file:a", 1)])
    fresh = open_table(lake, "users")
    assert fresh.version() == 1
    assert has_transaction(fresh, "file:a")
    assert not has_transaction(fresh, "file:b")
    assert last_metadata(fresh, "why") == "a test"
    assert last_metadata(fresh, "what") is None


def test_two_writers_cannot_commit_the_same_transaction(lake):
    first, second = create_users(lake), create_users(lake)
    commit_parts(first, [], transactions=[("file:a", 1)])
    with pytest.raises(ConflictError, match="run this one again"):
        commit_parts(second, [], transactions=[("file:a", 1)])


def test_an_overwrite_replaces_all_rows(lake):
    table = create_users(lake)
    commit_parts(table, [write_part(lake, "users", some_users(1), 1)])
    commit_parts(table, [write_part(lake, "users", some_users(2), 0)], mode="overwrite")
    assert read_table(open_table(lake, "users"))["user_id"].to_pylist() == [2]


def test_files_are_found_by_bucket(lake):
    table = create_users(lake)
    parts = [write_part(lake, "users", some_users(n), bucket) for n, bucket in ((1, 2), (2, 2))]
    commit_parts(table, [*parts, write_part(lake, "users", some_users(3), 0)])
    files = files_by_bucket(open_table(lake, "users"))
    assert {bucket: len(found) for bucket, found in files.items()} == {0: 1, 2: 2}
    assert bucket_files(table, 1) == []
    assert sorted(read_files(files[2], ["user_id"])["user_id"].to_pylist()) == [1, 2]


def test_columns_are_read_in_the_order_that_was_asked_for(lake):
    table = create_users(lake)
    commit_parts(table, [write_part(lake, "users", some_users(1), 2)])
    rows = read_files(bucket_files(table, 2), ["segment", "user_id"])
    assert rows.to_pylist() == [{"segment": "new", "user_id": 1}]
    assert rows.column_names == ["segment", "user_id"]


def test_upsert_inserts_and_updates_and_the_last_of_equal_keys_wins(lake):
    table = create_users(lake)
    upsert(table, some_users(1, 2), "user_id")
    newer = pa.concat_tables([some_users(2, segment="x"), some_users(2, 3, segment="gold")])
    merged = upsert(table, newer, "user_id", metadata={"from": "crm"})
    rows = {row["user_id"]: row for row in read_table(open_table(lake, "users")).to_pylist()}
    assert {user: row["segment"] for user, row in rows.items()} == {1: "new", 2: "gold", 3: "gold"}
    assert (merged["num_target_rows_inserted"], merged["num_target_rows_updated"]) == (1, 1)
    assert rows[3]["user_bucket"] == bucket_of(pa.array([3]), 4)[0]
    assert last_metadata(table, "from") == "crm"


def test_upsert_leaves_columns_alone_that_it_does_not_get(lake):
    table = create_table(lake, "items", items_schema("string"))
    upsert(table, pa.table({"item_id": ["a"], "title": ["Apple"], "price": [1.5]}), "item_id")
    upsert(table, pa.table({"item_id": ["a", "b"], "price": [2.0, 3.0]}), "item_id")
    rows = read_table(open_table(lake, "items"), ["item_id", "title", "price"]).to_pylist()
    assert sorted(tuple(row.values()) for row in rows) == [("a", "Apple", 2.0), ("b", None, 3.0)]


def test_a_lake_may_be_a_file_uri(lake):
    uri = "file://" + lake.replace("a lake", "lake")
    table = create_users(uri)
    commit_parts(table, [write_part(uri, "users", some_users(1), 3)])
    assert read_files(bucket_files(table, 3), ["user_id"])["user_id"].to_pylist() == [1]


@pytest.mark.parametrize("name", ["100%", "a b", "caf\u00e9", "a?b#c"])
def test_a_lake_may_have_odd_characters_in_its_path(tmp_path, name):
    lake = str(tmp_path / name)
    commit_parts(create_users(lake), [write_part(lake, "users", some_users(1), 3)])
    files = bucket_files(open_table(lake, "users"), 3)
    assert read_files(files, ["user_id"])["user_id"].to_pylist() == [1]


def test_a_lake_with_a_percent_code_in_its_path_is_refused(tmp_path):
    with pytest.raises(TableError, match=r"a%20b/users has a % code in its path"):
        create_users(str(tmp_path / "a%20b"))


def test_a_table_that_lacks_a_column_is_refused(lake):
    create_table(lake, "items", users_schema("string"))
    with pytest.raises(TableError, match="has no column item_id, title, category"):
        create_table(lake, "items", items_schema("string"))

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from deltalake.exceptions import DeltaError

from data_lake.buckets import bucket_of
from data_lake.errors import ConflictError, TableError
from data_lake.parquet import read_files
from data_lake.schemas import (
    TIMESTAMP,
    events_schema,
    items_schema,
    quarantine_schema,
    users_schema,
)
from data_lake.tables import (
    bucket_files,
    commit_parts,
    create_table,
    files_by_bucket,
    has_transaction,
    last_metadata,
    num_buckets_of,
    open_table,
    open_version,
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


def test_a_version_is_read_as_it_was_until_its_files_are_deleted(lake):
    table = create_users(lake)
    first = write_part(lake, "users", some_users(1), 0)
    version = commit_parts(table, [first])
    (file,), old = Path(lake).rglob("*.parquet"), files_by_bucket(table)[0]
    commit_parts(table, [write_part(lake, "users", some_users(2), 0)], removes=old)
    assert read_table(open_version(lake, "users", version))["user_id"].to_pylist() == [1]
    assert open_version(lake, "users", version + 1).version() == version + 1

    file.unlink()
    message = rf"Version {version} of the table 'users' .* raise maintain.retention_hours"
    with pytest.raises(TableError, match=message):
        open_version(lake, "users", version)
    with pytest.raises(TableError, match="Version 99 of the table 'users'"):
        open_version(lake, "users", 99)


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


def test_a_table_that_lacks_a_column_which_may_not_be_null_is_refused(lake):
    create_table(lake, "items", users_schema("string"))
    with pytest.raises(TableError, match="'items' has no column item_id; use a new"):
        create_table(lake, "items", items_schema("string"))


def test_columns_are_added_without_writing_a_file_anew(lake):
    table = create_users(lake)
    commit_parts(table, [write_part(lake, "users", some_users(1), 3)])
    before = bucket_files(table, 3)
    wider = users_schema("int64").append(pa.field("region", pa.string()))
    table = create_table(lake, "users", wider, num_buckets=4)
    assert (table.version(), bucket_files(table, 3)) == (2, before)
    assert create_table(lake, "users", wider, num_buckets=4).version() == 2

    newer = some_users(2).append_column("region", pa.array(["north"]))
    commit_parts(table, [write_part(lake, "users", newer, 3)])
    files = sorted(bucket_files(table, 3), key=lambda file: file not in before)
    expected = [{"user_id": 1, "region": None}, {"user_id": 2, "region": "north"}]
    assert read_files(files, ["user_id", "region"]).to_pylist() == expected
    rows = read_table(open_table(lake, "users"), ["user_id", "region"]).sort_by("user_id")
    assert rows.to_pylist() == expected


def test_columns_beyond_the_schema_are_left_alone(lake):
    wider = users_schema("int64").append(pa.field("region", pa.string()))
    create_table(lake, "users", wider, num_buckets=4)
    assert create_users(lake).version() == 0
    assert "region" in pa.schema(open_table(lake, "users").schema()).names


def test_all_who_create_and_widen_a_table_at_once_get_it(lake):
    wider = users_schema("int64").append(pa.field("region", pa.string()))
    schemas = [users_schema("int64"), wider] * 4

    def create(schema):
        return create_table(lake, "users", schema, num_buckets=4)

    for turn in range(10):
        lake = f"{lake}{turn}"
        with ThreadPoolExecutor(8) as pool:
            tables = list(pool.map(create, schemas))
        assert {num_buckets_of(table) for table in tables} == {4}
        table = open_table(lake, "users")
        assert "region" in pa.schema(table.schema()).names
        operations = [commit["operation"] for commit in table.history()]
        assert operations.count("CREATE TABLE") == 1


def test_all_who_add_a_column_at_once_get_it(lake):
    create_users(lake)
    wider = users_schema("int64").append(pa.field("region", pa.string()))
    with ThreadPoolExecutor(8) as pool:
        tables = pool.map(
            lambda _: create_table(lake, "users", wider, num_buckets=4), range(8), timeout=60
        )
        assert all("region" in pa.schema(table.schema()).names for table in tables)


def test_a_commit_replaces_files(lake):
    table = create_users(lake)
    commit_parts(table, [write_part(lake, "users", some_users(n), 3) for n in (1, 2)])
    old = bucket_files(table, 3)
    merged = write_part(lake, "users", some_users(1, 2, segment="gold"), 3)
    version = commit_parts(table, [merged], removes=old)
    (file,) = bucket_files(table, 3)
    assert file.endswith(merged.path)
    assert read_table(open_table(lake, "users"))["segment"].to_pylist() == ["gold", "gold"]
    assert open_table(lake, "users").history(1)[0]["version"] == version


def test_files_that_delta_wrote_can_be_replaced_too(lake):
    table = create_users(lake)
    upsert(table, some_users(1, 2, 3), "user_id")
    old = [uri for uris in files_by_bucket(table).values() for uri in uris]
    commit_parts(table, [], removes=old)
    assert files_by_bucket(open_table(lake, "users")) == {}


def test_two_writers_cannot_remove_the_same_file(lake):
    first = create_users(lake)
    commit_parts(first, [write_part(lake, "users", some_users(1), 3)])
    second, late = open_table(lake, "users"), open_table(lake, "users")
    files = bucket_files(first, 3)
    commit_parts(first, [], removes=files)
    with pytest.raises(ConflictError, match="at the same time"):
        commit_parts(second, [write_part(lake, "users", some_users(1), 3)], removes=files)
    late.update_incremental()
    with pytest.raises(ConflictError, match="has left"):
        commit_parts(late, [], removes=files)


def test_a_removal_leaves_appends_of_others_alone(lake):
    first = create_users(lake)
    commit_parts(first, [write_part(lake, "users", some_users(1), 3)])
    second = open_table(lake, "users")
    commit_parts(second, [write_part(lake, "users", some_users(2), 3)])
    commit_parts(first, [], removes=bucket_files(first, 3)[:1])
    assert read_table(open_table(lake, "users"))["user_id"].to_pylist() == [2]


def test_no_thread_of_arrow_calls_python_while_a_table_is_read(lake, monkeypatch):
    # Some of those processes that end right after reading would be aborted.
    table = create_users(lake)
    commit_parts(table, [write_part(lake, "users", some_users(1), 3)])
    monkeypatch.setattr("deltalake.fs.DeltaStorageHandler.from_table", None)
    assert read_table(table)["user_id"].to_pylist() == [1]


def test_the_same_rows_are_the_same_bytes(lake):
    paths = [write_part(lake, "users", some_users(1, 2, 3), 0).path for _ in range(2)]
    first, second = (Path(table_uri(lake, "users"), path).read_bytes() for path in paths)
    assert first == second


def test_text_that_comes_as_codes_is_read_as_text(lake):
    plain = some_users(1, 2)
    codes = plain.set_column(1, "segment", plain["segment"].dictionary_encode())
    part = write_part(lake, "users", codes, 0)
    assert read_files([f"{table_uri(lake, 'users')}/{part.path}"]).equals(plain)


def test_lists_of_codes_are_read_as_lists_of_text(lake):
    devices = pa.array(["app", "web", None]).dictionary_encode()
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 3], pa.int32()), devices)
    rows = pa.table({"user_id": ["a", "b"], "devices": lists})
    part = write_part(lake, "sequences", rows, 0)
    read = read_files([f"{table_uri(lake, 'sequences')}/{part.path}"])
    assert read["devices"].to_pylist() == [["app", "web"], [None]]
    assert read.schema.field("devices").type == pa.list_(pa.string())


def test_statistics_bound_codes_too(lake):
    rows = pa.table({"item_id": pa.array(["b", "a", "c"]).dictionary_encode()})
    stats = json.loads(write_part(lake, "events", rows, 0).stats)
    assert (stats["minValues"], stats["maxValues"]) == ({"item_id": "a"}, {"item_id": "c"})


def test_columns_of_any_writer_are_read_as_codes(lake):
    table = create_users(lake, num_buckets=1)
    commit_parts(table, [write_part(lake, "users", some_users(1, 2), 0)])
    upsert(table, some_users(3, segment="gold"), "user_id")  # Delta writes this file
    files = bucket_files(table, 0)
    rows = read_files(files, ["user_id", "segment", "region"], dictionary=["segment", "region"])
    codes = pa.dictionary(pa.int32(), pa.string())
    assert rows.schema.types == [pa.int64(), codes, codes]
    values = zip(rows["user_id"].to_pylist(), rows["segment"].to_pylist(), strict=True)
    assert dict(values) == {1: "new", 2: "new", 3: "gold"}
    assert rows["region"].null_count == 3
    dictionaries = [chunk.dictionary for chunk in rows["segment"].chunks]
    assert all(found.equals(dictionaries[0]) for found in dictionaries)


def test_lists_of_text_are_read_as_codes(lake):
    devices = [[["app", "web"], [None, "app"]], [["tv"], []]]
    parts = [
        write_part(lake, "sequences", pa.table({"user_id": users, "devices": lists}), 0)
        for users, lists in zip([["a", "b"], ["c", "d"]], devices, strict=True)
    ]
    parts.append(write_part(lake, "sequences", pa.table({"user_id": ["e"]}), 0))
    files = [f"{table_uri(lake, 'sequences')}/{part.path}" for part in parts]
    rows = read_files(files, ["user_id", "devices"], dictionary=["devices"])
    assert rows.schema.field("devices").type.value_type == pa.dictionary(pa.int32(), pa.string())
    assert rows["devices"].to_pylist() == [*devices[0], *devices[1], None]
    values = rows.combine_chunks()["devices"].chunk(0).flatten()
    assert values.to_pylist() == ["app", "web", None, "app", "tv"]
    missing = read_files(files[2:], ["user_id", "devices"], dictionary=["devices"])["devices"]
    assert missing.null_count == 1


def test_text_of_any_writer_is_read_as_text(lake):
    table = create_users(lake, num_buckets=1)
    commit_parts(table, [write_part(lake, "users", some_users(1), 0)])
    upsert(table, some_users(2), "user_id")
    rows = read_files(bucket_files(table, 0))
    assert rows.schema.field("segment").type == pa.string()


def test_a_column_that_no_file_has_is_null(lake):
    table = create_users(lake)
    commit_parts(table, [write_part(lake, "users", some_users(1, 2), 3)])
    rows = read_files(bucket_files(table, 3), ["region", "user_id"])
    assert rows.to_pydict() == {"region": [None, None], "user_id": [1, 2]}


def some_event(**changed):
    """One valid event, as a writer that knows nothing of us would append it."""
    moment = datetime(2025, 1, 2, tzinfo=UTC)
    event = {
        "event_id": "e1",
        "user_id": 1,
        "item_id": 2,
        "event_type": "view",
        "timestamp": moment,
        "price": None,
        "quantity": None,
        "ingested_at": moment,
        "arrival": 0,
        "user_bucket": 1,
    }
    return pa.Table.from_pylist([event | changed], events_schema("int64", "int64"))


@pytest.mark.parametrize(
    "wrong", [{"price": -1.0}, {"quantity": -1}, {"user_bucket": -1}], ids=lambda wrong: min(wrong)
)
def test_another_writer_is_held_to_the_rules_of_events(lake, wrong):
    table = create_table(lake, "events", events_schema("int64", "int64"), num_buckets=2)
    write_deltalake(table, some_event(), mode="append")
    with pytest.raises(DeltaError, match="1 rows failed validation check"):
        write_deltalake(table, some_event(**wrong), mode="append")
    assert read_table(open_table(lake, "events"))["event_id"].to_pylist() == ["e1"]


def test_a_table_with_rules_is_written_merged_deleted_and_compacted(lake):
    table = create_table(lake, "events", events_schema("int64", "int64"), num_buckets=2)
    parts = [write_part(lake, "events", some_event(event_id=name), 1) for name in "abc"]
    commit_parts(table, parts)
    rows = some_event(event_id="a", price=2.5).drop_columns(["user_bucket"])
    upsert(table, rows, "event_id")
    table.delete("event_id = 'b'")
    table.optimize.compact()
    rows = read_table(open_table(lake, "events"), ["event_id", "price"]).sort_by("event_id")
    assert rows.to_pylist() == [
        {"event_id": "a", "price": 2.5},
        {"event_id": "c", "price": None},
    ]

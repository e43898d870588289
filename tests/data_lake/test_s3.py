"""The lake in two object stores, each a process of its own: moto knows S3 in detail, and the store
of `tests.s3_server` refuses wrong keys and can be ended.
"""

import multiprocessing
import socket
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from data_lake.buckets import bucket_of
from data_lake.errors import ConflictError, LakeError, TableError
from data_lake.maintenance import checkpoint, compact, find_user, forget_users, vacuum
from data_lake.parquet import read_files
from data_lake.schemas import items_schema, users_schema
from data_lake.storage import delete_file, list_folder, open_file, write_file
from data_lake.tables import (
    bucket_files,
    commit_parts,
    create_table,
    files_by_bucket,
    has_transaction,
    num_buckets_of,
    open_table,
    read_table,
    table_exists,
    upsert,
    write_part,
)
from tests.s3_server import BUCKET, SECRET_KEY, options_for, running_store

pytestmark = pytest.mark.slow

_NUM_PROCESSES = 3
_COMMITS_EACH = 4


@pytest.fixture(scope="module", params=["tests.moto_server", "tests.s3_server"])
def options(request):
    with running_store(request.param) as options:
        yield options


@pytest.fixture(scope="module")
def strict_options():
    with running_store() as options:
        yield options


@pytest.fixture
def lake(request):
    return f"s3://{BUCKET}/{request.node.originalname}/lake"


def some_users(*user_ids, segment="new"):
    rows = [{"user_id": user_id, "segment": segment, "signup_at": None} for user_id in user_ids]
    schema = users_schema("int64")
    return pa.Table.from_pylist(rows, schema.remove(schema.get_field_index("user_bucket")))


def create_users(lake, options, schema=None):
    return create_table(lake, "users", schema or users_schema("int64"), options, num_buckets=4)


def segments(lake, options):
    rows = read_table(open_table(lake, "users", options), ["user_id", "segment"]).to_pylist()
    return {row["user_id"]: row["segment"] for row in rows}


def operations(lake, options):
    return Counter(commit["operation"] for commit in open_table(lake, "users", options).history())


def test_a_file_is_written_listed_read_and_deleted(options, lake):
    uri = f"{lake}/a folder/b.txt"
    write_file(uri, b"abc", options)
    assert [found.base_name for found in list_folder(lake, options)] == ["b.txt"]
    with open_file(uri, options) as file:
        file.seek(1)
        assert file.read() == b"bc"
    delete_file(uri, options)
    delete_file(uri, options)
    assert list_folder(lake, options) == []


def test_parts_are_committed_read_and_replaced(options, lake):
    assert not table_exists(lake, "users", options)
    table = create_users(lake, options)
    parts = [write_part(lake, "users", some_users(n), 3, options) for n in (1, 2)]
    assert commit_parts(table, parts, transactions=[("file:a", 1)]) == 1
    fresh = open_table(lake, "users", options)
    assert (num_buckets_of(fresh), has_transaction(fresh, "file:a")) == (4, True)
    old = bucket_files(fresh, 3)
    rows = read_files(old, ["user_id", "region"], options).sort_by("user_id")
    assert rows.to_pylist() == [{"user_id": 1, "region": None}, {"user_id": 2, "region": None}]
    commit_parts(fresh, [write_part(lake, "users", some_users(3), 3, options)], removes=old)
    assert segments(lake, options) == {3: "new"}


def test_rows_are_merged(options, lake):
    table = create_users(lake, options)
    upsert(table, some_users(1, 2), "user_id")
    upsert(table, some_users(2, 3, segment="gold"), "user_id")
    assert segments(lake, options) == {1: "new", 2: "gold", 3: "gold"}


def test_an_earlier_version_can_be_read(options, lake):
    table = create_users(lake, options)
    for n in (1, 2):
        part = write_part(lake, "users", some_users(n), 0, options)
        commit_parts(table, [part], removes=bucket_files(table, 0))
    table.load_as_version(1)
    assert read_table(table)["user_id"].to_pylist() == [1]
    assert read_files(bucket_files(table, 0), ["user_id"], options)["user_id"].to_pylist() == [1]


def test_vacuum_names_what_no_version_needs(options, lake):
    table = create_users(lake, options)
    part = write_part(lake, "users", some_users(1), 0, options)
    commit_parts(table, [part])
    commit_parts(table, [], removes=bucket_files(table, 0))
    assert table.vacuum(retention_hours=168) == []
    gone = table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=True)
    assert gone == [part.path]
    with open_file(f"{lake}/users/{part.path}", options) as file:
        assert file.size() == part.size_bytes


def test_upkeep_of_a_lake_in_a_store_merges_forgets_and_deletes(options, lake):
    table = create_users(lake, options)
    one, two, three = np.flatnonzero(bucket_of(pa.array(range(50)), 4) == 3)[:3].tolist()
    for user in (one, two, three):
        commit_parts(table, [write_part(lake, "users", some_users(user), 3, options)])
    assert forget_users(lake, "users", (str(two),), options) == 1
    compact(lake, "users", 2**20, options)
    (kept,) = bucket_files(open_table(lake, "users", options), 3)
    vacuum(lake, "users", 0, options)
    checkpoint(lake, "users", options)

    assert segments(lake, options) == {one: "new", three: "new"}
    assert find_user(lake, str(two), options) == []
    left = [file.base_name for file in list_folder(f"{lake}/users/user_bucket=3", options)]
    assert left == [kept.rpartition("/")[2]]


def test_columns_are_added_without_writing_a_file_anew(options, lake):
    table = create_users(lake, options)
    commit_parts(table, [write_part(lake, "users", some_users(1), 3, options)])
    before = files_by_bucket(table)
    wider = users_schema("int64").append(pa.field("region", pa.string()))
    assert files_by_bucket(create_users(lake, options, wider)) == before
    assert read_table(open_table(lake, "users", options), ["region"]).to_pylist() == [
        {"region": None}
    ]


def test_two_writers_cannot_remove_the_same_file(options, lake):
    first = create_users(lake, options)
    commit_parts(first, [write_part(lake, "users", some_users(1), 3, options)])
    second = open_table(lake, "users", options)
    files = bucket_files(first, 3)
    commit_parts(first, [], removes=files)
    with pytest.raises(ConflictError, match="run this one again"):
        commit_parts(second, [], removes=files)


def append_users(lake, options, first, barrier):
    """One of several writers: creates the table, or gets it, and fills it, a commit a user."""
    barrier.wait(60)
    for n in range(first, first + _COMMITS_EACH):
        table = create_users(lake, options)
        commit_parts(table, [write_part(lake, "users", some_users(n), n % 4, options)])


@pytest.mark.parametrize("is_local", [False, True], ids=["s3", "local"])
def test_what_several_processes_create_and_append_at_once_all_lands(
    options, lake, tmp_path, is_local
):
    lake = str(tmp_path) if is_local else lake
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(_NUM_PROCESSES)
    writers = [
        spawn.Process(target=append_users, args=(lake, options, 100 * n, barrier))
        for n in range(_NUM_PROCESSES)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0] * _NUM_PROCESSES
    assert operations(lake, options) == {"CREATE TABLE": 1, "WRITE": _NUM_PROCESSES * _COMMITS_EACH}
    assert sorted(segments(lake, options)) == [
        100 * n + k for n in range(_NUM_PROCESSES) for k in range(_COMMITS_EACH)
    ]


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


REQUESTS = {
    "create": lambda lake, options: create_table(lake, "items", items_schema("string"), options),
    "exists": lambda lake, options: table_exists(lake, "items", options),
    "open": lambda lake, options: open_table(lake, "items", options),
    "write a part": lambda lake, options: write_part(lake, "users", some_users(1), 0, options),
    "read": lambda lake, options: read_files([f"{lake}/users/a.parquet"], options=options),
    "list": lambda lake, options: list_folder(lake, options),
    "delete": lambda lake, options: delete_file(f"{lake}/a", options),
}


@pytest.mark.parametrize("request_name", REQUESTS)
def test_a_wrong_key_is_one_sentence_without_secrets(strict_options, lake, request_name):
    wrong = {**strict_options, "AWS_ACCESS_KEY_ID": "no-such-key"}
    with pytest.raises(
        LakeError, match=r"cannot be reached \(.*\); check .*storage\.opt"
    ) as caught:
        REQUESTS[request_name](lake, wrong)
    said = str(caught.value)
    assert "\n" not in said
    assert not [secret for secret in (SECRET_KEY, "no-such-key") if secret in said]
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("request_name", REQUESTS)
def test_a_store_that_is_not_there_is_one_sentence(lake, request_name):
    nowhere = options_for(f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(LakeError, match=r"(Connection refused|Could not connect)"):
        REQUESTS[request_name](lake, nowhere)


def test_a_store_that_does_not_answer_is_given_up(lake):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        options = options_for(f"http://127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(LakeError, match="timed out"):
            table_exists(lake, "users", {**options, "timeout": "1s", "retry_timeout": "1s"})


def test_a_bucket_that_is_not_there_is_named(options):
    with pytest.raises(LakeError, match=r"s3://elsewhere/lake/items .*404 Not Found: NoSuchBucket"):
        REQUESTS["create"]("s3://elsewhere/lake", options)


def test_a_store_that_goes_away_fails_the_commit():
    with running_store() as options:
        lake = f"s3://{BUCKET}/lake"
        table = create_users(lake, options)
        part = write_part(lake, "users", some_users(1), 0, options)
    with pytest.raises(LakeError, match=r"lake/users/ cannot be reached .*error sending request"):
        commit_parts(table, [part])


def test_a_lake_with_odd_characters_in_its_uri_is_refused(options):
    with pytest.raises(TableError, match="a b/users has characters that a URI writes as % codes"):
        create_users(f"s3://{BUCKET}/a b", options)

import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake.exceptions import CommitFailedError

from data_lake import maintenance
from data_lake.buckets import bucket_of
from data_lake.errors import ConflictError
from data_lake.maintenance import (
    checkpoint,
    compact,
    count_files,
    find_in_folder,
    find_in_log,
    find_user,
    find_users,
    forget_in_folder,
    forget_users,
    run_here,
    vacuum,
)
from data_lake.parquet import read_files
from data_lake.schemas import (
    TIMESTAMP,
    events_schema,
    items_schema,
    quarantine_schema,
    sequences_schema,
    users_schema,
)
from data_lake.sequences import EVENT_COLUMNS, SequencesConfig, build_sequences
from data_lake.tables import (
    commit_parts,
    create_table,
    files_by_bucket,
    has_transaction,
    last_metadata,
    open_table,
    read_table,
    table_uri,
    upsert,
    write_part,
)

NUM_BUCKETS = 4
NAMES = ("o'brien", "bob", "alice", "carl", "dora", "é", "eve")
HOUR_S = 3600
TARGET = 2**27


@pytest.fixture
def lake(tmp_path):
    return str(tmp_path / "a lake")


def bucket(user):
    return int(bucket_of(pa.array([user]), NUM_BUCKETS)[0])


def some_events(users, id_type="string", start=0):
    """One row a user, with item `i<n>`, a microsecond apart."""
    at = range(start, start + len(users))
    given = {
        "event_id": [f"e{n}" for n in at],
        "user_id": users,
        "item_id": [f"i{n}" for n in at],
        "event_type": ["view"] * len(users),
        "timestamp": at,
        "ingested_at": [start] * len(users),
        "arrival": range(len(users)),
        "user_bucket": [bucket(user) for user in users],
    }
    columns = [
        pa.array(given[field.name], pa.int64()).cast(TIMESTAMP)
        if field.type == TIMESTAMP
        else pa.array(given.get(field.name, [None] * len(users)), field.type)
        for field in events_schema(id_type, "string")
    ]
    return pa.Table.from_arrays(columns, schema=events_schema(id_type, "string"))


def add_events(lake, users=NAMES, id_type="string", start=0, **commit):
    """Commits an event a user, one file a bucket."""
    create_table(lake, "events", events_schema(id_type, "string"), num_buckets=NUM_BUCKETS)
    events = some_events(list(users), id_type, start)
    numbers = events["user_bucket"].to_numpy()
    parts = [
        write_part(lake, "events", events.filter(pa.array(numbers == n)), n) for n in set(numbers)
    ]
    commit_parts(open_table(lake, "events"), parts, **commit)


def add_users(lake, users, segment="new"):
    table = create_table(lake, "users", users_schema("string"), num_buckets=NUM_BUCKETS)
    rows = {"user_id": list(users), "segment": [segment] * len(users)}
    upsert(table, pa.table(rows), "user_id")


def add_quarantine(lake, *texts):
    table = create_table(lake, "quarantine", quarantine_schema())
    rows = [
        {"raw": text, "reason": "bad", "source": "x", "ingested_at": datetime.now(UTC)}
        for text in texts
    ]
    part = write_part(lake, "quarantine", pa.Table.from_pylist(rows, quarantine_schema()))
    commit_parts(table, [part])


def rows_of(lake, name="events"):
    """All rows, in an order of their own."""
    rows = read_table(open_table(lake, name))
    return rows.sort_by([(column, "ascending") for column in rows.column_names[:2]])


def sequences_of(lake):
    """The sequences of each bucket, as the job would build them."""
    built = {}
    for number, files in files_by_bucket(open_table(lake, "events")).items():
        events = read_files(files, [name for name in EVENT_COLUMNS if name != "user_bucket"])
        numbers = pa.array([number] * events.num_rows, pa.int32())
        rules = SequencesConfig(min_user_events=1)
        built[number] = build_sequences(events.append_column("user_bucket", numbers), None, rules)[
            0
        ].to_pylist()
    return built


def log_entry(lake, name, version):
    return Path(table_uri(lake, name), "_delta_log", f"{version:020d}.json").read_text()


def make_old(lake, pattern, hours, name="events"):
    moment = time.time() - hours * HOUR_S
    for path in Path(table_uri(lake, name)).glob(pattern):
        os.utime(path, (moment, moment))


def remove_long_ago(monkeypatch, hours):
    """Files that are replaced from here on count as removed so many hours ago."""
    now_ns = time.time_ns() - hours * HOUR_S * 10**9
    monkeypatch.setattr(maintenance.time, "time_ns", lambda: now_ns)


@pytest.mark.parametrize(
    ("id_type", "users", "gone"),
    [("string", NAMES, "o'brien"), ("string", NAMES, "é"), ("int64", (5, 42, -7, 2**60), "42")],
)
def test_a_forgotten_user_is_gone_and_all_others_are_the_same(lake, id_type, users, gone):
    add_events(lake, users, id_type)
    add_events(lake, users, id_type, start=100)
    before = rows_of(lake)
    assert forget_users(lake, "events", [gone]) == 2
    is_kept = [str(user) != gone for user in before["user_id"].to_pylist()]
    assert rows_of(lake).equals(before.filter(pa.array(is_kept)))


def test_only_files_that_hold_the_user_are_rewritten_in_one_commit(lake):
    add_events(lake)
    add_events(lake, ["bob"], start=100)
    add_events(lake, ["alice"], start=200)
    before = files_by_bucket(open_table(lake, "events"))
    forget_users(lake, "events", ["bob", "alice"])
    table = open_table(lake, "events")
    after = files_by_bucket(table)
    holding = {bucket("bob"), bucket("alice")}
    assert {n for n in before if after.get(n) != before[n]} == holding
    assert table.version() == 4


def test_a_file_that_held_nobody_else_is_removed(lake):
    add_events(lake, ["bob"])
    assert forget_users(lake, "events", ["bob"]) == 1
    assert count_files(lake, "events") == 0


def test_forgetting_a_stranger_commits_nothing(lake):
    add_events(lake)
    assert forget_users(lake, "events", ["nobody"]) == 0
    assert forget_users(lake, "events", []) == 0
    assert open_table(lake, "events").version() == 1


def test_forgetting_twice_is_forgetting_once(lake):
    add_events(lake)
    assert [forget_users(lake, "events", ["bob"]) for _ in range(2)] == [1, 0]
    assert open_table(lake, "events").version() == 2


def test_users_and_sequences_are_forgotten_too(lake):
    add_users(lake, NAMES)
    sequences = create_table(
        lake, "sequences", sequences_schema("string", "string"), num_buckets=NUM_BUCKETS
    )
    row = {"user_id": "bob", "segment": None, "item_ids": ["i1"], "event_types": ["view"]}
    row |= {"timestamps": [datetime.now(UTC)], "devices": [None]}
    rows = [row, row | {"user_id": "x"}]
    schema = pa.schema(
        [field for field in sequences_schema("string", "string") if field.name in row]
    )
    part = write_part(lake, "sequences", pa.Table.from_pylist(rows, schema), bucket("bob"))
    commit_parts(sequences, [part])
    assert forget_users(lake, "sequences", ["bob"]) == 1
    assert forget_users(lake, "users", ["bob"]) == 1
    assert rows_of(lake, "sequences")["user_id"].to_pylist() == ["x"]
    assert set(rows_of(lake, "users")["user_id"].to_pylist()) == set(NAMES) - {"bob"}


def test_items_have_no_users_to_forget(lake):
    upsert(
        create_table(lake, "items", items_schema("string")), pa.table({"item_id": ["a"]}), "item_id"
    )
    assert forget_users(lake, "items", ["a"]) == 0
    assert find_user(lake, "a") == []


def test_quarantined_rows_that_mention_a_user_go_whosever_they_are(lake):
    bad = json.dumps({"visitor": "o'brien", "at": "never"})
    add_quarantine(lake, bad, "i1,o'brien", '{"visitor": "o\\u0027brien"}', "i1,o'brienne", "bob")
    assert forget_users(lake, "quarantine", ["o'brien"]) == 3
    assert set(rows_of(lake, "quarantine")["raw"].to_pylist()) == {"i1,o'brienne", "bob"}


def test_the_entry_of_the_log_that_forgets_names_nobody(lake):
    add_events(lake, ["bob", "bob", "o'brien"])
    forget_users(lake, "events", ["bob", "o'brien"])
    assert "brien" not in log_entry(lake, "events", 2)
    assert "bob" not in log_entry(lake, "events", 2)


def test_an_id_of_the_wrong_type_is_refused(lake):
    add_events(lake, [1, 2], "int64")
    with pytest.raises(ValueError, match=r"int64 in this lake, and 'bob' is none"):
        forget_users(lake, "events", ["bob"])


def test_events_that_arrive_while_a_user_is_forgotten_go_too(lake):
    add_events(lake)
    late = iter([["bob"]])

    def run_beside_an_ingest(function, arguments):
        found = run_here(function, arguments)
        for users in late:
            add_events(lake, users, start=100)
        return found

    assert forget_users(lake, "events", ["bob"], None, run_beside_an_ingest) == 2
    assert find_live(lake, "bob") == []
    assert rows_of(lake).num_rows == len(NAMES) - 1


def test_a_lost_race_is_run_again_on_what_the_winner_left(lake):
    add_events(lake, ["bob", "bob", "carl"])
    rivals = iter([["carl"]])

    def run_beside_another(function, arguments):
        found = run_here(function, arguments)
        for users in rivals:
            forget_users(lake, "events", users)
        return found

    assert forget_users(lake, "events", ["bob"], None, run_beside_another) == 2
    assert rows_of(lake).num_rows == 0


def test_who_always_loses_gives_up_and_leaves_no_file_behind(lake, monkeypatch):
    add_events(lake, ["bob", *NAMES])
    before = sorted(Path(lake).rglob("*.parquet"))

    def lose(*arguments, **options):
        raise CommitFailedError("another one was faster")

    monkeypatch.setattr(maintenance, "_commit", lose)
    with pytest.raises(ConflictError, match=r"changed .*events/ 5 times meanwhile; run this one"):
        forget_users(lake, "events", ["bob"])
    assert sorted(Path(lake).rglob("*.parquet")) == before


def test_an_ingest_that_commits_while_users_are_forgotten_is_refused(lake):
    add_events(lake)
    ingest = open_table(lake, "events")
    part = write_part(lake, "events", some_events(["bob"], start=100), bucket("bob"))
    forget_users(lake, "events", ["bob"])
    with pytest.raises(ConflictError):
        commit_parts(ingest, [part])


def test_small_files_of_a_bucket_become_one_with_the_same_rows(lake):
    for start in (0, 100, 200):
        add_events(lake, start=start)
    before, num_before = rows_of(lake), count_files(lake, "events")
    compact(lake, "events", TARGET)
    assert {n: len(uris) for n, uris in files_by_bucket(open_table(lake, "events")).items()} == {
        n: 1 for n in {bucket(name) for name in NAMES}
    }
    assert num_before == 3 * count_files(lake, "events")
    assert rows_of(lake).equals(before)


def test_sequences_are_the_same_after_a_compaction(lake):
    for start in (200, 0, 100):
        add_events(lake, start=start)
    before = sequences_of(lake)
    compact(lake, "events", TARGET)
    assert sequences_of(lake) == before


def test_sequences_of_the_others_are_the_same_after_one_user_is_forgotten(lake):
    add_events(lake)
    add_events(lake, start=100)
    before = sequences_of(lake)
    forget_users(lake, "events", ["carl"])
    compact(lake, "events", TARGET)
    expected = {n: [row for row in rows if row["user_id"] != "carl"] for n, rows in before.items()}
    assert {n: sequences_of(lake).get(n, []) for n in before} == expected


def test_files_grow_to_the_target_and_not_beyond(lake):
    for start in range(4):
        add_events(lake, ["bob"], start=start)
    size = max(path.stat().st_size for path in Path(lake).rglob("user_bucket=*/*.parquet"))
    compact(lake, "events", 2 * size)
    assert count_files(lake, "events") == 2


def test_compacting_twice_is_compacting_once(lake):
    add_events(lake)
    add_events(lake, start=100)
    compact(lake, "events", TARGET)
    compact(lake, "events", TARGET)
    assert open_table(lake, "events").version() == 3


def test_a_compaction_changes_no_data_by_the_log(lake):
    add_events(lake, ["bob"])
    add_events(lake, ["bob"], start=100)
    compact(lake, "events", TARGET)
    actions = [json.loads(line) for line in log_entry(lake, "events", 3).splitlines()]
    files = [action.get("add") or action.get("remove") for action in actions]
    assert [file["dataChange"] for file in files if file] == [False, False, False]


def test_an_ingest_and_a_compaction_do_not_disturb_each_other(lake):
    add_events(lake)
    add_events(lake, start=100)
    part = write_part(lake, "events", some_events(["bob"], start=200), bucket("bob"))
    ingest = open_table(lake, "events")
    late = iter([["bob"]])

    def run_beside_an_ingest(function, arguments):
        merged = run_here(function, arguments)
        for users in late:
            add_events(lake, users, start=300)
        return merged

    compact(lake, "events", TARGET, None, run_beside_an_ingest)
    commit_parts(ingest, [part])
    assert rows_of(lake).num_rows == 2 * len(NAMES) + 2


def test_of_two_compactions_at_a_time_one_starts_again(lake):
    add_events(lake)
    add_events(lake, start=100)
    rivals = iter([TARGET])

    def run_beside_another(function, arguments):
        merged = run_here(function, arguments)
        for target in rivals:
            compact(lake, "events", target)
        return merged

    compact(lake, "events", TARGET, None, run_beside_another)
    assert rows_of(lake).num_rows == 2 * len(NAMES)


def test_users_are_read_whether_an_upsert_or_a_compaction_wrote_them(lake):
    add_users(lake, ["bob"])
    add_users(lake, [name for name in NAMES if name != "bob"])
    compact(lake, "users", TARGET)
    add_users(lake, ["bob", "zed"], segment="gold")
    files = [uri for uris in files_by_bucket(open_table(lake, "users")).values() for uri in uris]
    rows = read_files(files, ["user_id", "segment"]).to_pylist()
    assert len(rows) == len(NAMES) + 1
    assert {row["user_id"] for row in rows if row["segment"] == "gold"} == {"bob", "zed"}


def test_quarantine_has_no_buckets_and_is_compacted_too(lake):
    add_quarantine(lake, "one")
    add_quarantine(lake, "two")
    compact(lake, "quarantine", TARGET)
    assert count_files(lake, "quarantine") == 1
    assert set(rows_of(lake, "quarantine")["raw"].to_pylist()) == {"one", "two"}


def test_a_vacuum_spares_young_files_that_have_yet_to_be_committed(lake):
    add_events(lake)
    young = write_part(lake, "events", some_events(["bob"], start=100), bucket("bob"))
    orphan = write_part(lake, "events", some_events(["bob"], start=200), bucket("bob"))
    make_old(lake, orphan.path, hours=169)
    assert vacuum(lake, "events", 168) == [orphan.path]
    commit_parts(open_table(lake, "events"), [young])
    assert rows_of(lake).num_rows == len(NAMES) + 1


def test_a_vacuum_spares_what_a_version_of_the_retention_needs(lake):
    add_events(lake)
    before = rows_of(lake)
    forget_users(lake, "events", NAMES)
    make_old(lake, "user_bucket=*/*.parquet", hours=1000)
    assert vacuum(lake, "events", 168) == []
    old = open_table(lake, "events")
    old.load_as_version(1)
    assert read_table(old).num_rows == before.num_rows


def test_a_vacuum_deletes_what_was_removed_before_the_retention(lake, monkeypatch):
    add_events(lake)
    num_files = count_files(lake, "events")
    remove_long_ago(monkeypatch, hours=169)
    forget_users(lake, "events", NAMES)
    assert len(vacuum(lake, "events", 168)) == num_files
    assert list(Path(lake).rglob("user_bucket=*/*.parquet")) == []


def test_a_vacuum_with_nothing_to_do_makes_no_version(lake):
    add_events(lake)
    assert vacuum(lake, "events", 168) == []
    assert open_table(lake, "events").version() == 1


def test_a_retention_beyond_a_week_holds_after_a_checkpoint(lake, monkeypatch):
    add_events(lake)
    remove_long_ago(monkeypatch, hours=200)
    forget_users(lake, "events", NAMES)
    monkeypatch.undo()
    make_old(lake, "user_bucket=*/*.parquet", hours=1000)
    checkpoint(lake, "events")
    assert vacuum(lake, "events", 720) == []
    old = open_table(lake, "events")
    old.load_as_version(1)
    assert read_table(old).num_rows == len(NAMES)


def test_transactions_survive_a_checkpoint_that_cleans_the_log(lake):
    add_events(lake, metadata={"why": "a test"}, transactions=[("events:abc", 1)])
    add_events(lake, start=100)
    make_old(lake, "_delta_log/*.json", hours=31 * 24)
    checkpoint(lake, "events")
    names = sorted(path.name for path in Path(table_uri(lake, "events"), "_delta_log").iterdir())
    assert names == [f"{2:020d}.checkpoint.parquet", f"{2:020d}.json", "_last_checkpoint"]
    table = open_table(lake, "events")
    assert has_transaction(table, "events:abc")
    assert last_metadata(table, "why") is None
    assert rows_of(lake).num_rows == 2 * len(NAMES)


def find_live(lake, user_id):
    return [trace.uri for trace in find_user(lake, user_id) if trace.is_live]


def test_every_file_of_a_user_is_found_and_nobody_elses(lake):
    add_events(lake)
    add_events(lake, start=100)
    add_users(lake, NAMES)
    add_quarantine(lake, "x,bob,y", "alice")
    found = find_users(lake, ["bob", "nobody"])
    tables = sorted(trace.uri.removeprefix(lake).split("/")[1] for trace in found["bob"])
    assert tables == ["events", "events", "quarantine", "users"]
    assert all(trace.is_live for trace in found["bob"])
    assert found["nobody"] == []


def test_a_forgotten_user_is_found_until_the_vacuum(lake):
    add_events(lake)
    started = datetime.now(UTC)
    forget_users(lake, "events", ["bob"])
    make_old(lake, "user_bucket=*/*.parquet", hours=1000)
    [trace] = find_user(lake, "bob")
    assert not trace.is_live
    # Neither when it was written nor when it was searched, but when it was removed.
    assert timedelta(seconds=-1) < trace.since - started < timedelta(minutes=5)
    checkpoint(lake, "events")
    assert find_user(lake, "bob") == [trace]
    vacuum(lake, "events", 0)
    assert find_user(lake, "bob") == []
    assert len(find_live(lake, "alice")) == 1


def test_files_that_no_version_knows_are_searched_wherever_they_lie(lake):
    add_events(lake, ["alice"])
    part = write_part(lake, "events", some_events(["bob"], start=100), bucket("bob"))
    astray = Path(table_uri(lake, "events"), "astray.parquet")
    pq.write_table(some_events(["bob"]), astray)
    make_old(lake, part.path, hours=5)
    traces = {trace.uri: trace for trace in find_user(lake, "bob")}
    assert sorted(traces) == sorted([str(astray), f"{table_uri(lake, 'events')}/{part.path}"])
    age = datetime.now(UTC) - traces[f"{table_uri(lake, 'events')}/{part.path}"].since
    assert timedelta(hours=5) <= age < timedelta(hours=6)


def test_a_torn_file_may_hold_anyone(lake):
    add_events(lake, ["alice"])
    torn = Path(table_uri(lake, "events"), "user_bucket=0", "part-torn.zstd.parquet")
    torn.parent.mkdir(exist_ok=True)
    torn.write_bytes(b"PAR1 and no more")
    assert [trace.uri for trace in find_user(lake, "bob")] == [str(torn)]


def test_integer_ids_are_found(lake):
    add_events(lake, [1, 42, 421], "int64")
    add_quarantine(lake, '{"u": 42.0}', '{"u": 421}')
    assert len(find_user(lake, "42")) == 2
    forget_users(lake, "events", ["42"])
    forget_users(lake, "quarantine", ["42"])
    assert find_live(lake, "42") == []


def test_the_log_names_a_user_until_the_checkpoint_above_is_a_month_old(lake):
    add_events(lake, ["bob"])
    add_events(lake, ["alice", "carl"], start=100)
    forget_users(lake, "events", ["bob"])
    checkpoint(lake, "events")
    assert sorted(find_in_log(lake, ["bob", "alice", "nobody"])) == ["alice", "bob"]

    make_old(lake, "_delta_log/*.json", hours=32 * 24)
    make_old(lake, "_delta_log/*.checkpoint.parquet", hours=31 * 24)
    summed_up = datetime.now(UTC) - find_in_log(lake, ["bob"])["bob"]
    assert timedelta(days=31) <= summed_up < timedelta(days=32)
    add_events(lake, ["carl"], start=200)
    checkpoint(lake, "events")
    assert sorted(find_in_log(lake, ["bob", "alice"])) == ["alice"]


def test_exports_are_rewritten_in_place_where_they_hold_the_user(tmp_path):
    folder = tmp_path / "history" / "v3-last50"
    folder.mkdir(parents=True)
    histories = pa.table({"user_id": ["bob", "alice"], "item_ids": [["i1"], ["i2", None]]})
    pq.write_table(histories, folder / "bucket-00000.parquet")
    pq.write_table(histories.slice(1), folder / "bucket-00001.parquet")
    other = folder / "bucket-00001.parquet"
    # Reading changes the time of access alone.
    before = other.stat()
    assert forget_in_folder(str(tmp_path / "history"), ["bob"]) == 1
    assert forget_in_folder(str(tmp_path / "history"), ["bob"]) == 0
    assert pq.read_table(folder / "bucket-00000.parquet").equals(histories.slice(1))
    after = other.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [path.suffix for path in folder.iterdir()] == [".parquet", ".parquet"]


def test_what_is_left_in_exports_is_found(tmp_path):
    pq.write_table(pa.table({"user_id": [1, 2]}), tmp_path / "one.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    found = find_in_folder(str(tmp_path), ["2", "3"])
    assert [Path(uri).name for uri in sorted(found["2"])] == ["one.parquet", "torn.parquet"]
    assert [Path(uri).name for uri in found["3"]] == ["torn.parquet"]
    assert forget_in_folder(str(tmp_path), ["3"]) == 0


def test_a_folder_that_is_not_there_holds_nobody(tmp_path):
    assert forget_in_folder(str(tmp_path / "history"), ["bob"]) == 0
    assert find_in_folder(str(tmp_path / "history"), ["bob"]) == {"bob": {}}

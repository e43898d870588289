import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import pytest

from data_lake.errors import ConflictError, SourceError
from data_lake.tables import commit_parts, open_table, read_table, upsert
from ray_jobs import generate, ingest
from ray_jobs.config import PipelineConfig
from ray_jobs.job import load_config

EVENTS = {
    "path": "$SHOP/events",
    "format": "csv",
    "columns": {
        "user_id": "visitor",
        "item_id": "item",
        "event_type": "event",
        "timestamp": "at",
    },
    "timestamp_unit": "s",
    "values": {"event_type": {"transaction": "purchase"}},
}
USERS = {
    "path": "$SHOP/users.csv",
    "format": "csv",
    "columns": {"user_id": "id", "segment": "tier"},
}
HEADER = "visitor,item,event,at"
DAY_ONE = ("u1,i1,view,1000000000", "u2,i2,transaction,1000000001", "u1,i1,view,1000000000")
DAY_TWO = ("u1,i3,view,1000000002", ",i3,view,1000000003", "u2,i2,transaction,1000000001")


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """An empty shop below `$SHOP`."""
    monkeypatch.setenv("SHOP", str(tmp_path))
    (tmp_path / "events").mkdir()
    return tmp_path


def write_csv(path, lines, header=HEADER):
    path.write_text("\n".join([header, *lines, ""]))


def pipeline(*, events=(EVENTS,), **tables):
    config = {"num_buckets": 4, "events": list(events)} | tables
    return PipelineConfig(name="toy", storage={"root": "$SHOP"}, ingest=config)


def read(shop, name):
    return read_table(open_table(str(shop / "lake"), name)).to_pylist()


def counts(report):
    names = ("read", "committed", "duplicate", "quarantined")
    return tuple(report.figures[name] for name in names)


@pytest.mark.ray
def test_rows_are_committed_duplicate_or_quarantined(shop, ray_cluster):
    write_csv(shop / "events" / "1.csv", DAY_ONE)
    write_csv(shop / "events" / "2.csv", DAY_TWO)
    report = ingest.run(pipeline())
    assert counts(report) == (6, 3, 2, 1)
    events = sorted(
        (row["user_id"], row["item_id"], row["event_type"]) for row in read(shop, "events")
    )
    assert events == [("u1", "i1", "view"), ("u1", "i3", "view"), ("u2", "i2", "purchase")]
    (bad,) = read(shop, "quarantine")
    assert bad["reason"] == "user_id is missing"
    assert json.loads(bad["raw"]) == {
        "visitor": None,
        "item": "i3",
        "event": "view",
        "at": "1000000003",
    }
    assert bad["source"] == str(shop / "events" / "2.csv")
    told = (shop / "metrics" / "ingest.prom").read_text()
    assert 'nextitem_ingest_rows{data="toy"} 6.0' in told
    assert f'nextitem_ingest_quarantined_ratio{{data="toy"}} {1 / 6}' in told
    assert 'nextitem_newest_event_age_seconds{data="toy"} ' in told


@pytest.mark.ray
def test_a_file_is_taken_once_whatever_its_name(shop, ray_cluster):
    write_csv(shop / "events" / "1.csv", DAY_ONE)
    ingest.run(pipeline())
    write_csv(shop / "events" / "copy.csv", DAY_ONE)
    report = ingest.run(pipeline())
    assert (report.figures["files"], report.figures["files_known_already"]) == (0, 1)
    assert report.figures["events_version"] == 1
    assert len(read(shop, "events")) == 2


@pytest.mark.ray
def test_a_new_file_brings_only_its_new_events(shop, ray_cluster):
    write_csv(shop / "events" / "1.csv", DAY_ONE)
    ingest.run(pipeline())
    write_csv(shop / "events" / "2.csv", DAY_TWO)
    report = ingest.run(pipeline())
    assert counts(report) == (3, 1, 1, 1)
    assert report.figures["events_version"] == 2


@pytest.mark.ray
def test_reading_again_adds_what_a_better_map_finds(shop, ray_cluster):
    write_csv(shop / "events" / "1.csv", DAY_ONE)
    wrong = EVENTS | {"timestamp_unit": "us"}
    assert counts(ingest.run(pipeline(events=[wrong]))) == (3, 0, 0, 3)
    assert ingest.run(pipeline()).figures["files"] == 0
    assert counts(ingest.run(pipeline(again=True))) == (3, 2, 1, 0)


@pytest.mark.ray
def test_a_run_that_died_between_its_commits_is_made_good(shop, ray_cluster, monkeypatch):
    def die(table, parts, **rest):
        if "events" in table.table_uri.rstrip("/").rpartition("/")[2]:
            raise KeyboardInterrupt
        return commit_parts(table, parts, **rest)

    write_csv(shop / "events" / "2.csv", DAY_TWO)
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "commit_parts", die)
        with pytest.raises(KeyboardInterrupt):
            ingest.run(pipeline())
    assert (len(read(shop, "quarantine")), read(shop, "events")) == (1, [])

    write_csv(shop / "events" / "3.csv", ("u9,,view,1000000003",))
    assert counts(ingest.run(pipeline())) == (4, 2, 0, 2)
    # The row of the first try is not there twice, and that of the new file is.
    assert sorted(row["source"][-5:] for row in read(shop, "quarantine")) == ["2.csv", "3.csv"]


@pytest.mark.ray
def test_order_of_arrival_follows_files_and_lines(shop, ray_cluster):
    write_csv(shop / "events" / "1.csv", [f"u1,i{n},view,1000000000" for n in range(5)])
    write_csv(shop / "events" / "2.csv", [f"u1,i{n},view,1000000000" for n in range(5, 9)])
    ingest.run(pipeline())
    rows = sorted(read(shop, "events"), key=lambda row: row["arrival"])
    assert [row["item_id"] for row in rows] == [f"i{n}" for n in range(9)]
    assert [row["arrival"] for row in rows] == [*range(5), *range(2**32, 2**32 + 4)]


@pytest.mark.ray
def test_users_are_updated_and_the_same_file_is_no_new_version(shop, ray_cluster):
    write_csv(shop / "events" / "1.csv", DAY_ONE)
    write_csv(shop / "users.csv", ["u1,new", "u2,new", ",x"], header="id,tier")
    report = ingest.run(pipeline(users=[USERS]))
    assert (report.figures["users_upserted"], report.figures["users_quarantined"]) == (2, 1)
    version = open_table(str(shop / "lake"), "users").version()
    ingest.run(pipeline(users=[USERS]))
    assert open_table(str(shop / "lake"), "users").version() == version

    write_csv(shop / "users.csv", ["u1,gold"], header="id,tier")
    ingest.run(pipeline(users=[USERS]))
    segments = {row["user_id"]: row["segment"] for row in read(shop, "users")}
    assert segments == {"u1": "gold", "u2": "new"}


@pytest.mark.ray
def test_a_file_that_goes_back_to_an_earlier_state_is_taken(shop, ray_cluster):
    write_csv(shop / "events" / "1.csv", DAY_ONE)
    for tier in ("new", "gold", "new"):
        write_csv(shop / "users.csv", [f"u1,{tier}"], header="id,tier")
        ingest.run(pipeline(users=[USERS]))
    assert [row["segment"] for row in read(shop, "users")] == ["new"]


@pytest.mark.ray
def test_a_wrong_source_stops_the_job_before_anything_is_written(shop, ray_cluster):
    write_csv(shop / "events" / "1.csv", DAY_ONE)
    (shop / "events" / "2.csv").write_text("user,item\n1,2\n")
    with pytest.raises(SourceError) as caught:
        ingest.run(pipeline())
    # Said as it was in the task, without the trace of it.
    assert str(caught.value).startswith(f"{shop}/events/2.csv has no column 'visitor', 'event'")
    assert not (shop / "lake").exists()


@pytest.mark.ray
def test_files_without_rows_are_an_error(shop, ray_cluster):
    write_csv(shop / "events" / "1.csv", [])
    with pytest.raises(SourceError, match=r"1\.csv has no rows"):
        ingest.run(pipeline())


@pytest.mark.ray
def test_a_generated_shop_arrives_clean(shop, ray_cluster, monkeypatch):
    monkeypatch.setenv("NEXTITEM_HOME", str(shop))
    small = ["num_users=300", "num_items=50", "num_categories=4", "num_parts=2"]
    dirt = ["broken_share=0.1", "duplicate_share=0.1", "late_share=0.1"]
    config = load_config("synthetic", [f"generate.{value}" for value in [*small, *dirt]])
    made = generate.run(config).figures
    report = ingest.run(config)
    assert report.figures["read"] == made["rows_with_dirt"]
    assert report.figures["committed"] == made["events"]
    assert report.figures["quarantined"] > 0
    assert len(read_table(open_table(config.storage.lake_uri, "users"))) == 300


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_events"), [("ml-1m", 1_000_209), ("retailrocket", 97_381), ("globo", 2_988_181)]
)
def test_real_logs_arrive_whole(name, num_events, tmp_path, ray_cluster, monkeypatch):
    monkeypatch.setenv("NEXTITEM_HOME", str(tmp_path))
    config = load_config(name)
    _ = config.storage.lake_uri  # finds NEXTITEM_DATA where it is not set
    if not Path(os.path.expandvars(config.ingest.events[0].path)).exists():
        pytest.skip(f"NEXTITEM_DATA does not lead to {name}")
    report = ingest.run(config)
    assert counts(report) == (num_events, num_events, 0, 0)
    events = read_table(open_table(config.storage.lake_uri, "events"), ["event_id"])
    assert len(events["event_id"].unique()) == num_events


@pytest.mark.ray
def test_a_bad_delivery_leaves_what_is_there(shop, ray_cluster):
    write_csv(shop / "events" / "1.csv", DAY_ONE)
    ingest.run(pipeline())
    (shop / "events" / "2.csv").write_text("user,item\n1,2\n")
    with pytest.raises(SourceError, match=r"2\.csv has no column"):
        ingest.run(pipeline())
    assert open_table(str(shop / "lake"), "events").version() == 1
    assert len(read(shop, "events")) == 2


@pytest.mark.ray
def test_late_events_and_rows_added_to_a_file_land_beside_what_is_there(shop, ray_cluster):
    write_csv(shop / "events" / "1.csv", DAY_ONE)
    ingest.run(pipeline())
    write_csv(shop / "events" / "1.csv", [*DAY_ONE, "u1,i9,view,900000000"])
    assert counts(ingest.run(pipeline())) == (4, 1, 3, 0)
    rows = sorted(read(shop, "events"), key=lambda row: row["timestamp"])
    assert [row["item_id"] for row in rows] == ["i9", "i1", "i2"]


def before_the_commit(monkeypatch, name, act):
    """Lets `act` happen once, right before the next commit of a table."""

    def commit(table, parts, **rest):
        if table.table_uri.rstrip("/").endswith(name) and acts:
            acts.pop()()
        return commit_parts(table, parts, **rest)

    acts = [act]
    monkeypatch.setattr(ingest, "commit_parts", commit)


def files_of_no_table(shop, name):
    """Parquet files that lie in the folder of a table, but are not in its newest version."""
    table = open_table(str(shop / "lake"), name)
    lying = {str(path) for path in (shop / "lake" / name).rglob("*.parquet")}
    return lying - {unquote(uri.removeprefix("file://")) for uri in table.file_uris()}


@pytest.mark.ray
def test_two_runs_at_a_time_both_land(shop, ray_cluster, monkeypatch):
    reports = []
    write_csv(shop / "events" / "1.csv", DAY_ONE)
    other = EVENTS | {"path": "$SHOP/others"}
    (shop / "others").mkdir()
    write_csv(shop / "others" / "2.csv", DAY_TWO)
    before_the_commit(
        monkeypatch, "events", lambda: reports.append(ingest.run(pipeline(events=[other])))
    )
    reports.append(ingest.run(pipeline()))
    # Both have the purchase of u2; the slower run takes its own back.
    assert [counts(report) for report in reports] == [(3, 2, 0, 1), (3, 1, 2, 0)]
    ids = [row["event_id"] for row in read(shop, "events")]
    assert len(ids) == len(set(ids)) == 3
    assert files_of_no_table(shop, "events") == set()
    assert len(read(shop, "quarantine")) == 1


@pytest.mark.ray
@pytest.mark.parametrize("name", ["events", "quarantine"])
def test_two_runs_with_the_same_file_take_each_row_once(shop, ray_cluster, monkeypatch, name):
    reports = []
    write_csv(shop / "events" / "2.csv", DAY_TWO)
    before_the_commit(monkeypatch, name, lambda: reports.append(ingest.run(pipeline())))
    reports.append(ingest.run(pipeline()))
    assert [counts(report) for report in reports] == [(3, 2, 0, 1), (3, 0, 2, 1)]
    assert len(read(shop, "events")) == 2
    assert len(read(shop, "quarantine")) == 1
    for table in ("events", "quarantine"):
        assert files_of_no_table(shop, table) == set()
    assert ingest.run(pipeline()).figures["files"] == 0


@pytest.mark.ray
@pytest.mark.slow
def test_many_runs_at_a_time_all_land(shop, ray_cluster):
    # Each shares its first half with the run before it, and its bad row with all others.
    sources = []
    for run in range(4):
        lines = [f"u{n},i{n},view,{10**9 + n}" for n in range(run * 100, run * 100 + 200)]
        write_csv(shop / "events" / f"{run}.csv", [*lines, ",i3,view,1000000003"])
        sources.append(EVENTS | {"path": f"$SHOP/events/{run}.csv"})
    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(lambda one: ingest.run(pipeline(events=[one])), sources))
    read_rows, committed, _, quarantined = map(sum, zip(*map(counts, reports), strict=True))
    assert (read_rows, committed, quarantined) == (804, 500, 4)
    assert len({row["event_id"] for row in read(shop, "events")}) == 500
    assert len(read(shop, "events")) == 500
    assert len(read(shop, "quarantine")) == 4
    assert files_of_no_table(shop, "events") == set()


@pytest.mark.ray
def test_a_run_that_always_loses_gives_up_and_leaves_nothing(shop, ray_cluster, monkeypatch):
    def lose(table, parts, **rest):
        raise ConflictError("another job was faster; run this one again.")

    write_csv(shop / "events" / "1.csv", DAY_ONE)
    monkeypatch.setattr(ingest, "commit_parts", lose)
    with pytest.raises(ConflictError, match="run this one again"):
        ingest.run(pipeline())
    assert read(shop, "events") == []
    assert files_of_no_table(shop, "events") == set()


@pytest.mark.ray
def test_a_commit_of_unknown_outcome_keeps_its_files(shop, ray_cluster, monkeypatch):
    def commit_and_lose_the_answer(table, parts, **rest):
        commit_parts(table, parts, **rest)
        raise OSError("connection reset by peer")

    write_csv(shop / "events" / "1.csv", DAY_ONE)
    monkeypatch.setattr(ingest, "commit_parts", commit_and_lose_the_answer)
    with pytest.raises(OSError, match="connection reset"):
        ingest.run(pipeline())
    assert len(read(shop, "events")) == 2


@pytest.mark.ray
def test_a_commit_that_landed_though_it_was_called_lost_is_taken_as_such(
    shop, ray_cluster, monkeypatch
):
    def commit_and_say_no(table, parts, **rest):
        commit_parts(table, parts, **rest)
        raise ConflictError("another job was faster; run this one again.")

    write_csv(shop / "events" / "2.csv", DAY_TWO)
    monkeypatch.setattr(ingest, "commit_parts", commit_and_say_no)
    assert counts(ingest.run(pipeline())) == (3, 2, 0, 1)
    assert (len(read(shop, "events")), len(read(shop, "quarantine"))) == (2, 1)


@pytest.mark.ray
def test_users_that_another_run_changes_meanwhile_are_updated_all_the_same(
    shop, ray_cluster, monkeypatch
):
    def upsert_after_another_run(table, rows, key, **rest):
        monkeypatch.setattr(ingest, "upsert", upsert)
        write_csv(shop / "users.csv", ["u1,silver", "u3,new"], header="id,tier")
        ingest.run(pipeline(users=[USERS]))
        return upsert(table, rows, key, **rest)

    write_csv(shop / "events" / "1.csv", DAY_ONE)
    write_csv(shop / "users.csv", ["u1,gold"], header="id,tier")
    monkeypatch.setattr(ingest, "upsert", upsert_after_another_run)
    ingest.run(pipeline(users=[USERS]))
    segments = {row["user_id"]: row["segment"] for row in read(shop, "users")}
    assert segments == {"u1": "gold", "u3": "new"}


@pytest.mark.ray
def test_a_new_context_column_is_null_in_earlier_events(shop, ray_cluster):
    write_csv(shop / "events" / "1.csv", DAY_ONE)
    ingest.run(pipeline())
    before = set((shop / "lake" / "events").rglob("*.parquet"))
    header, lines = f"{HEADER},region", [f"{line},north" for line in DAY_TWO]
    write_csv(shop / "events" / "1.csv", lines, header=header)
    mapped = EVENTS | {"columns": EVENTS["columns"] | {"region": "region"}}
    report = ingest.run(pipeline(events=[mapped], context=["region"]))
    assert report.figures["committed"] == 2  # what is said of the region makes another event
    assert before < set((shop / "lake" / "events").rglob("*.parquet"))
    regions = sorted((row["ingested_at"], row["region"]) for row in read(shop, "events"))
    assert [region for _, region in regions] == [None, None, "north", "north"]

    # A configuration that no longer names the column leaves it null.
    write_csv(shop / "events" / "1.csv", ["u7,i3,view,1000000009"])
    ingest.run(pipeline())
    (last,) = (row for row in read(shop, "events") if row["user_id"] == "u7")
    assert last["region"] is None


@pytest.mark.ray
def test_a_missing_file_ends_the_command_with_one_sentence(shop):
    (shop / "toy.toml").write_text(
        f'''
        name = "toy"
        storage = {{ root = "{shop}" }}
        [[ingest.events]]
        path = "{shop}/nothing.csv"
        format = "csv"
        columns = {{ user_id = "u", item_id = "i", event_type = "e", timestamp = "t" }}
        '''
    )
    command = [sys.executable, "-m", "ray_jobs.ingest", "--config", str(shop / "toy.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ingest failed: There is no file {shop}/nothing.csv; check the path of the csv source."
    )

"""Rows of a delivery are found by their run and their file, and only they leave."""

from datetime import UTC, datetime

import pyarrow as pa
import pytest

from data_lake.buckets import bucket_of
from data_lake.errors import ConflictError
from data_lake.ingest import ROWS_OF_A_PART
from data_lake.maintenance import compact, run_here
from data_lake.schemas import TIMESTAMP, events_schema, quarantine_schema
from data_lake.tables import commit_parts, create_table, open_table, read_table, write_part
from data_lake.withdrawal import (
    Delivery,
    count_delivered,
    count_duplicates_since,
    read_deliveries,
    withdraw,
    write_note,
)

SCHEMA = events_schema("string", "string")
FIRST_RUN, SECOND_RUN = 1_760_000_000_000_000, 1_760_000_000_000_001


@pytest.fixture
def lake(tmp_path):
    return str(tmp_path / "lake")


def moments(values):
    return pa.array(values, pa.int64()).cast(TIMESTAMP)


def add_events(lake, run, files, num_duplicates=0):
    """Commits one event for each user of each file, as an ingest that began at `run` does."""
    table = create_table(lake, "events", SCHEMA, num_buckets=2)
    users = [user for names in files.values() for user in names]
    arrival = [
        part * ROWS_OF_A_PART + row
        for part, names in enumerate(files.values())
        for row in range(len(names))
    ]
    given = {
        "event_id": [f"{run}-{at}" for at in arrival],
        "user_id": users,
        "item_id": ["i1"] * len(users),
        "event_type": ["view"] * len(users),
        "timestamp": moments([run] * len(users)),
        "ingested_at": moments([run] * len(users)),
        "arrival": arrival,
        "user_bucket": bucket_of(pa.array(users), 2),
    }
    columns = [
        pa.array(given.get(field.name, [None] * len(users))).cast(field.type) for field in SCHEMA
    ]
    rows = pa.Table.from_arrays(columns, schema=SCHEMA)
    buckets = rows["user_bucket"].to_numpy()
    parts = [
        write_part(lake, "events", rows.filter(pa.array(buckets == number)), number)
        for number in sorted(set(buckets.tolist()))
    ]
    commit_parts(table, parts, metadata=write_note(deliveries(run, files), num_duplicates))


def deliveries(run, files):
    return [Delivery(path, f"sha-{path}-{run}", at, 1, run) for at, path in enumerate(files)]


def add_quarantine(lake, run, sources):
    table = create_table(lake, "quarantine", quarantine_schema())
    columns = [
        ["{}"] * len(sources),
        ["bad"] * len(sources),
        sources,
        moments([run] * len(sources)),
    ]
    rows = pa.table(columns, schema=quarantine_schema())
    commit_parts(table, [write_part(lake, "quarantine", rows)])


def users_of(lake):
    return sorted(read_table(open_table(lake, "events"))["user_id"].to_pylist())


def notes_of(lake):
    return read_deliveries(open_table(lake, "events"))


def named(lake, path):
    return [one for one in notes_of(lake) if one.path == path]


def test_the_log_tells_which_files_came_with_which_run(lake):
    add_events(lake, FIRST_RUN, {"a.csv": ["u1"], "b.csv": ["u2"]})
    add_events(lake, SECOND_RUN, {"c.csv": ["u3"]})
    found = [(one.path, one.first_part, one.ingested_us, one.version) for one in notes_of(lake)]
    assert found == [
        ("c.csv", 0, SECOND_RUN, 2),
        ("a.csv", 0, FIRST_RUN, 1),
        ("b.csv", 1, FIRST_RUN, 1),
    ]
    assert notes_of(lake)[0].ingested_at == datetime(2025, 10, 9, 8, 53, 20, 1, tzinfo=UTC)


def test_rows_of_one_file_leave_and_those_of_its_run_stay(lake):
    add_events(lake, FIRST_RUN, {"a.csv": ["u1", "u2"], "b.csv": ["u2", "u3"]})
    add_events(lake, SECOND_RUN, {"c.csv": ["u4"], "d.csv": ["u5"]})
    chosen = named(lake, "b.csv")
    assert count_delivered(lake, "events", chosen) == 2
    assert withdraw(lake, "events", chosen) == 2
    assert users_of(lake) == ["u1", "u2", "u4", "u5"]


def test_withdrawn_twice_is_withdrawn_once(lake):
    add_events(lake, FIRST_RUN, {"a.csv": ["u1", "u2"], "b.csv": ["u3"]})
    chosen = named(lake, "a.csv")
    withdraw(lake, "events", chosen)
    version = open_table(lake, "events").version()
    assert withdraw(lake, "events", chosen) == 0
    assert open_table(lake, "events").version() == version
    assert users_of(lake) == ["u3"]


def test_rows_are_found_in_files_that_were_merged_since(lake):
    add_events(lake, FIRST_RUN, {"a.csv": ["u1", "u2"]})
    add_events(lake, SECOND_RUN, {"a.csv": ["u1", "u2"]})
    compact(lake, "events", 2**27)
    first = [one for one in named(lake, "a.csv") if one.ingested_us == FIRST_RUN]
    assert withdraw(lake, "events", first) == 2
    left = read_table(open_table(lake, "events"))["ingested_at"].cast(pa.int64()).to_pylist()
    assert left == [SECOND_RUN, SECOND_RUN]


def test_what_arrives_meanwhile_stays(lake):
    add_events(lake, FIRST_RUN, {"a.csv": ["u1", "u2"]})
    late = iter([{"b.csv": ["u1", "u3"]}])

    def run_beside_an_ingest(function, arguments):
        found = run_here(function, arguments)
        for files in late:
            add_events(lake, SECOND_RUN, files)
        return found

    assert withdraw(lake, "events", named(lake, "a.csv"), None, run_beside_an_ingest) == 2
    assert users_of(lake) == ["u1", "u3"]


def test_an_ingest_under_way_is_refused(lake):
    add_events(lake, FIRST_RUN, {"a.csv": ["u1"]})
    ingest = open_table(lake, "events")
    withdraw(lake, "events", named(lake, "a.csv"))
    with pytest.raises(ConflictError):
        commit_parts(ingest, [], transactions=[("ingest", 1)])


def test_quarantine_gives_up_the_rows_of_a_file_and_of_files_below_a_folder(lake):
    sources = ["/d/a.csv", "/d/a.csv.old", "/d/landing/1.parquet", "/d/b.csv"]
    add_quarantine(lake, FIRST_RUN, sources)
    add_quarantine(lake, SECOND_RUN, sources)
    chosen = [
        Delivery("/d/a.csv", "sha", 0, 1, FIRST_RUN),
        Delivery("/d/landing", "", 1, 5, FIRST_RUN),
    ]
    assert withdraw(lake, "quarantine", chosen) == 2
    rows = read_table(open_table(lake, "quarantine")).to_pylist()
    assert sorted(row["source"] for row in rows) == sorted([*sources, sources[1], sources[3]])


def test_a_table_that_is_not_there_has_no_rows_to_give_up(lake):
    chosen = [Delivery("a.csv", "sha", 0, 1, FIRST_RUN)]
    assert withdraw(lake, "quarantine", chosen) == count_delivered(lake, "events", chosen) == 0


def test_rows_that_later_runs_left_out_are_counted(lake):
    add_events(lake, FIRST_RUN, {"a.csv": ["u1"]}, num_duplicates=7)
    add_events(lake, SECOND_RUN, {"b.csv": ["u2"]}, num_duplicates=3)
    table = open_table(lake, "events")
    assert count_duplicates_since(table, named(lake, "a.csv")) == 3
    assert count_duplicates_since(table, named(lake, "b.csv")) == 0

import hashlib

import pyarrow as pa
import pytest

from data_lake.buckets import bucket_of
from data_lake.errors import ConflictError, TableError
from data_lake.schemas import TIMESTAMP, events_schema, users_schema
from data_lake.sequences import SequencesConfig
from data_lake.storage import open_file
from data_lake.tables import (
    commit_parts,
    create_table,
    files_by_bucket,
    open_table,
    read_table,
    upsert,
    write_part,
)
from ray_jobs import build_sequences
from ray_jobs.config import PipelineConfig
from ray_jobs.sections.models import TrainConfig
from ray_jobs.sections.storage import StorageConfig
from ray_jobs.sequences_reader import learn_vocabulary
from recsys.context import ContextConfig

INGEST = {"events": [{"path": "events", "format": "parquet", "columns": {}}]}
NUM_BUCKETS = 4
EVENTS = [(1, 10), (1, 11), (2, 10), (2, 10), (2, 12), (3, 10), (4, 13), (4, 11)]


def pipeline(tmp_path, **rules):
    storage = StorageConfig(root=str(tmp_path))
    return PipelineConfig(
        name="toy", storage=storage, ingest=INGEST, sequences=SequencesConfig(**rules)
    )


def write_events(tmp_path, rows, *, start=0, regions=()):
    """Commits (user, item) rows, one microsecond apart."""
    lake = str(tmp_path / "lake")
    schema = events_schema("int64", "int64", ["region"] if regions else [])
    table = create_table(lake, "events", schema, num_buckets=NUM_BUCKETS)
    parts = []
    for at, (user, item) in enumerate(rows, start):
        bucket = int(bucket_of(pa.array([user]), NUM_BUCKETS)[0])
        values = [f"e{at}", user, item, "view", at, "app", None, None, None, 0, at, bucket]
        values += regions[at - start : at - start + 1]
        row = [
            pa.array([value], pa.int64() if field.type == TIMESTAMP else field.type).cast(
                field.type
            )
            for value, field in zip(values, schema, strict=True)
        ]
        parts.append(write_part(lake, "events", pa.Table.from_arrays(row, schema=schema), bucket))
    commit_parts(table, parts)


def bucket_contents(tmp_path):
    """sha256 of each bucket's only file."""
    files = files_by_bucket(open_table(str(tmp_path / "lake"), "sequences"))
    assert all(len(of_bucket) == 1 for of_bucket in files.values())
    return {
        bucket: hashlib.sha256(open_file(file).read()).hexdigest()
        for bucket, (file,) in files.items()
    }


def read_sequences(tmp_path):
    rows = read_table(open_table(str(tmp_path / "lake"), "sequences")).to_pylist()
    return {row["user_id"]: row for row in rows}


@pytest.mark.ray
def test_events_become_one_sequence_a_user(tmp_path, ray_cluster):
    write_events(tmp_path, EVENTS)
    report = build_sequences.run(pipeline(tmp_path))
    rows = read_sequences(tmp_path)
    assert {user: row["item_ids"] for user, row in rows.items()} == {
        1: [10, 11],
        2: [10, 12],
        4: [13, 11],
    }
    assert rows[1]["user_bucket"] == bucket_of(pa.array([1]), NUM_BUCKETS)[0]
    assert rows[1]["segment"] is None
    figures = report.figures
    assert (figures["removed_repeats"], figures["removed_short_users"]) == (1, 1)
    assert (figures["users_kept"], figures["events_kept"], figures["median_length"]) == (3, 6, 2)


@pytest.mark.ray
def test_segments_come_from_the_users_table(tmp_path, ray_cluster):
    write_events(tmp_path, EVENTS)
    lake = str(tmp_path / "lake")
    users = create_table(lake, "users", users_schema("int64"), num_buckets=NUM_BUCKETS)
    new = {"user_id": [1, 2], "segment": ["gold", "new"], "signup_at": pa.nulls(2, TIMESTAMP)}
    upsert(users, pa.table(new), "user_id")
    build_sequences.run(pipeline(tmp_path))
    segments = {user: row["segment"] for user, row in read_sequences(tmp_path).items()}
    assert segments == {1: "gold", 2: "new", 4: None}


@pytest.mark.ray
def test_nothing_is_built_while_events_and_rules_are_the_same(tmp_path, ray_cluster):
    write_events(tmp_path, EVENTS)
    build_sequences.run(pipeline(tmp_path))
    before = open_table(str(tmp_path / "lake"), "sequences").version()
    report = build_sequences.run(pipeline(tmp_path))
    assert "nothing to do" in report.headline
    assert open_table(str(tmp_path / "lake"), "sequences").version() == before


@pytest.mark.ray
@pytest.mark.parametrize("rules", [{}, {"min_item_events": 2, "core_passes": 3}])
def test_touched_buckets_alone_are_built_and_the_table_is_that_of_a_full_build(
    tmp_path, ray_cluster, rules
):
    # Item 16 becomes frequent with the second commit, and with it changes a bucket of the first.
    first = [(user, 10 + (user * step) % 5) for user in range(1, 9) for step in range(1, 4)]
    first += [(1, 16)]
    later = [(3, 16), (3, 12), (20, 10), (20, 11), (20, 12)]
    write_events(tmp_path / "steps", first)
    build_sequences.run(pipeline(tmp_path / "steps", **rules))
    before = files_by_bucket(open_table(str(tmp_path / "steps/lake"), "sequences"))
    write_events(tmp_path / "steps", later, start=100)
    report = build_sequences.run(pipeline(tmp_path / "steps", **rules))

    write_events(tmp_path / "whole", first)
    write_events(tmp_path / "whole", later, start=100)
    build_sequences.run(pipeline(tmp_path / "whole", **rules))
    assert bucket_contents(tmp_path / "steps") == bucket_contents(tmp_path / "whole")
    if rules:
        assert 16 in read_sequences(tmp_path / "steps")[1]["item_ids"]
    else:
        after = files_by_bucket(open_table(str(tmp_path / "steps/lake"), "sequences"))
        touched = {int(b) for b in bucket_of(pa.array([user for user, _ in later]), NUM_BUCKETS)}
        assert {b for b in after if after[b] != before.get(b)} == touched
        assert report.figures["buckets_built"] == len(touched)


@pytest.mark.ray
def test_a_bucket_without_events_loses_its_sequences(tmp_path, ray_cluster):
    write_events(tmp_path, EVENTS)
    build_sequences.run(pipeline(tmp_path))
    events = open_table(str(tmp_path / "lake"), "events")
    gone = int(bucket_of(pa.array([1]), NUM_BUCKETS)[0])
    events.delete(f"user_bucket = {gone}")
    build_sequences.run(pipeline(tmp_path))
    assert gone not in files_by_bucket(open_table(str(tmp_path / "lake"), "sequences"))


@pytest.mark.ray
def test_a_commit_that_changes_no_events_builds_nothing(tmp_path, ray_cluster):
    write_events(tmp_path, EVENTS)
    build_sequences.run(pipeline(tmp_path))
    before = bucket_contents(tmp_path)
    events = open_table(str(tmp_path / "lake"), "events")
    events.alter.set_table_properties({"delta.logRetentionDuration": "interval 60 days"})
    report = build_sequences.run(pipeline(tmp_path))
    assert report.figures["buckets_built"] == 0
    assert bucket_contents(tmp_path) == before
    assert "nothing to do" in build_sequences.run(pipeline(tmp_path)).headline


@pytest.mark.ray
def test_of_two_builds_at_once_one_is_told_to_run_again(tmp_path, ray_cluster, monkeypatch):
    write_events(tmp_path, EVENTS)
    commit = build_sequences._commit
    other = []

    def commit_late(*arguments):
        if not other:
            other.append(True)
            build_sequences.run(pipeline(tmp_path))
        return commit(*arguments)

    monkeypatch.setattr(build_sequences, "_commit", commit_late)
    with pytest.raises(ConflictError, match="run this one again"):
        build_sequences.run(pipeline(tmp_path))
    assert len(read_sequences(tmp_path)) == 3


@pytest.mark.ray
def test_a_new_context_column_reaches_sequences_and_vocabulary(tmp_path, ray_cluster):
    write_events(tmp_path, EVENTS)
    build_sequences.run(pipeline(tmp_path))
    config = pipeline(tmp_path)
    fields = {"categorical": ("device", "region"), "time": ()}
    config = config.model_copy(update={"train": TrainConfig(context=ContextConfig(**fields))})
    with pytest.raises(TableError, match="names region, which no event carries"):
        learn_vocabulary(open_table(str(tmp_path / "lake"), "sequences"), config)

    write_events(tmp_path, [(1, 12), (1, 13)], start=100, regions=["north", "south"])
    build_sequences.run(pipeline(tmp_path))
    assert read_sequences(tmp_path)[1]["region"] == [None, None, "north", "south"]
    assert read_sequences(tmp_path)[2]["region"] == [None, None]
    sequences = open_table(str(tmp_path / "lake"), "sequences")
    learned = learn_vocabulary(sequences, config)
    # The last two events of a user are held out.
    assert learned.vocabulary.context.vocabularies == {"device": ("app",), "region": ()}


@pytest.mark.ray
def test_new_events_replace_the_table_in_one_commit(tmp_path, ray_cluster):
    write_events(tmp_path, EVENTS)
    first = build_sequences.run(pipeline(tmp_path)).figures["sequences_version"]
    write_events(tmp_path, [(3, 14)], start=100)
    second = build_sequences.run(pipeline(tmp_path)).figures["sequences_version"]
    assert second == first + 1
    assert read_sequences(tmp_path)[3]["item_ids"] == [10, 14]
    assert len(read_sequences(tmp_path)) == 4


@pytest.mark.ray
def test_rare_items_are_counted_over_all_buckets(tmp_path, ray_cluster):
    write_events(tmp_path, EVENTS)
    report = build_sequences.run(pipeline(tmp_path, min_item_events=2))
    # Items 12 and 13 were seen once; users 2 and 4 are too short without them.
    assert report.figures["removed_rare_items"] == 2
    assert list(read_sequences(tmp_path)) == [1]


@pytest.mark.ray
def test_rules_that_leave_nobody_keep_the_old_table(tmp_path, ray_cluster):
    write_events(tmp_path, EVENTS)
    build_sequences.run(pipeline(tmp_path))
    with pytest.raises(TableError, match=r"leave no user of 4; loosen"):
        build_sequences.run(pipeline(tmp_path, min_user_events=9))
    assert len(read_sequences(tmp_path)) == 3


def test_a_missing_table_says_which_job_makes_it(tmp_path):
    with pytest.raises(TableError, match=r"no table 'events' .* run ray_jobs\.ingest first"):
        build_sequences.run(pipeline(tmp_path))


def test_an_empty_table_says_so(tmp_path):
    schema = events_schema("int64", "int64")
    create_table(str(tmp_path / "lake"), "events", schema, num_buckets=NUM_BUCKETS)
    with pytest.raises(TableError, match="has no rows"):
        build_sequences.run(pipeline(tmp_path))

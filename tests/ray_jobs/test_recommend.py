"""Lists for everybody, beside those that the endpoint gives."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import torch

from data_lake.buckets import bucket_of
from data_lake.errors import ConflictError
from data_lake.maintenance import forget_users
from data_lake.schemas import (
    TIMESTAMP,
    events_schema,
    recommendations_schema,
    sequences_schema,
    users_schema,
)
from data_lake.tables import (
    commit_parts,
    create_table,
    open_table,
    read_table,
    table_exists,
    upsert,
    write_part,
)
from ray_jobs import recommend
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.recommend import Order, make_lists, make_queries
from ray_jobs.sections.serving import RecommendConfig
from recsys.artifact import load_artifact, publish
from recsys.list_maker import ListMaker
from recsys.queries import Event, Query, RequestContext
from serve_app.history_stores.store import SeedRow
from serve_app.schemas import RecommendRequest
from tests.conftest import START_US, write_artifact
from tests.serve_app.conftest import ShopFront

NUM_BUCKETS = 2
HISTORY_EVENTS = 6
HISTORIES = {
    "ann": ("loyal", ["i1", "i2", "i3"]),
    "ben": ("new", [f"i{n}" for n in range(10)]),
    "cai": (None, ["i7"]),
    "dee": ("new", ["gone", "away"]),
    "eve": ("loyal", ["i5", "gone", "i5", "i39"]),
}
"""Segment and items; what is gone is not in the catalogue."""
NEWCOMERS = {"fay": "loyal", "gus": None}
"""Of the users table; "hal" has one event and no sequence."""
ALL = [*HISTORIES, *NEWCOMERS, "hal"]

KILLED = """
name = "toy"
storage = {{ root = "{root}" }}
[[ingest.events]]
path = "none"
format = "csv"
columns = {{}}
[recommend]
num_actors = 1
batch_size = 64
"""


def pipeline(root, registry, **chosen):
    if not (root / "registry").exists():
        (root / "registry").symlink_to(registry)
    return PipelineConfig(
        name="toy",
        storage={"root": str(root)},
        ingest={"events": [{"path": "none", "format": "csv", "columns": {}}]},
        publish={"history_events": HISTORY_EVENTS},
        recommend={"num_actors": 1, "batch_size": 3, **chosen},
    )


def sequences_table():
    lengths = [len(items) for _, items in HISTORIES.values()]
    times = [[START_US + 60_000_000 * n for n in range(length)] for length in lengths]
    return pa.table(
        {
            "user_id": list(HISTORIES),
            "segment": [segment for segment, _ in HISTORIES.values()],
            "item_ids": [items for _, items in HISTORIES.values()],
            "event_types": [["view"] * length for length in lengths],
            "timestamps": pa.array(times, pa.list_(pa.int64())).cast(pa.list_(TIMESTAMP)),
            "devices": [["mobile"] * length for length in lengths],
        }
    )


def write_buckets(lake, name, rows, schema, num_buckets=NUM_BUCKETS):
    table = create_table(lake, name, schema, num_buckets=num_buckets)
    buckets = bucket_of(rows["user_id"], num_buckets)
    parts = [
        write_part(lake, name, rows.filter(pa.array(buckets == bucket)), bucket)
        for bucket in range(num_buckets)
        if (buckets == bucket).any()
    ]
    commit_parts(table, parts)


@pytest.fixture
def lake(tmp_path):
    """Users with sequences, without any, and one with a single event."""
    lake = str(tmp_path / "lake")
    write_buckets(lake, "sequences", sequences_table(), sequences_schema("string", "string"))
    schema = events_schema("string", "string")
    event = {"event_id": "e1", "user_id": "hal", "item_id": "i1", "event_type": "view"}
    event |= {"timestamp": START_US, "ingested_at": START_US, "arrival": 0}
    fields = [field for field in schema if field.name != "user_bucket"]
    columns = {
        field.name: pa.array([event.get(field.name)], pa.int64()).cast(TIMESTAMP)
        if field.type == TIMESTAMP
        else pa.array([event.get(field.name)], field.type)
        for field in fields
    }
    write_buckets(lake, "events", pa.table(columns, schema=pa.schema(fields)), schema)
    users = create_table(lake, "users", users_schema("string"), num_buckets=NUM_BUCKETS)
    names = {"user_id": list(NEWCOMERS), "segment": list(NEWCOMERS.values())}
    upsert(users, pa.table(names), "user_id")
    return lake


def read_lists(lake):
    rows = read_table(open_table(lake, "recommendations")).to_pylist()
    return {row["user_id"]: row for row in rows}


@pytest.fixture
def online(registry, tmp_path):
    """Asks the endpoint, which knows the same histories, at a moment."""
    front = ShopFront(registry, tmp_path / "serving", deadline_ms=9000, history_timeout_ms=9000)
    rows = sequences_table().to_pylist()
    front.history.load(
        SeedRow(
            row["user_id"],
            row["item_ids"][-HISTORY_EVENTS:],
            row["event_types"][-HISTORY_EVENTS:],
            [round(time.timestamp() * 1e6) for time in row["timestamps"]][-HISTORY_EVENTS:],
            row["devices"][-HISTORY_EVENTS:],
        )
        for row in rows
    )

    def ask(user_id, segment, created_at, top_k=10):
        front.now_s = created_at.timestamp()
        body = {"user_id": user_id, "top_k": top_k}
        if segment is not None:
            body["context"] = {"segment": segment}
        request = RecommendRequest.model_validate(body)
        return front.client.runner.run(front.recommender.recommend(request))

    yield ask
    front.client.runner.run(front.intake.close())
    front.client.runner.close()


@pytest.mark.ray
def test_everybody_gets_the_list_of_the_endpoint(tmp_path, registry, lake, online, ray_cluster):
    compare_with_endpoint(recommend.run(pipeline(tmp_path, registry)), lake, online)


@pytest.mark.parametrize("batch_size", [1, 512])
def test_so_they_do_in_one_process(tmp_path, registry, lake, online, without_ray, batch_size):
    report = recommend.run(pipeline(tmp_path, registry, batch_size=batch_size))
    compare_with_endpoint(report, lake, online)


def compare_with_endpoint(report, lake, online):
    found = read_lists(lake)
    assert sorted(found) == sorted(ALL)
    segments = {name: segment for name, (segment, _) in HISTORIES.items()} | NEWCOMERS
    for user_id, row in found.items():
        answer = online(user_id, segments.get(user_id), row["created_at"])
        assert row["item_ids"] == [one.item_id for one in answer.recommendations]
        assert row["scores"] == pytest.approx([one.score for one in answer.recommendations], 1e-4)
        assert (row["source"] == "model") == (answer.source == "model")
        assert row["model_version"] == answer.model_version == "v1"
    sources = Counter(row["source"] for row in found.values())
    assert sources == {"model": 4, "fallback": 4}
    assert (report.figures["by_model"], report.figures["by_fallback"]) == (4, 4)


@pytest.fixture
def without_ray(monkeypatch):
    """One actor's work in this process."""

    def make_all(config, order, buckets):
        actor = recommend.BucketRecommender(order)
        for bucket in buckets:
            made = actor(pa.table({"bucket": [json.dumps(asdict(bucket))]}))
            yield from map(json.loads, made["made"].to_pylist())

    monkeypatch.setattr(recommend, "_make_all", make_all)
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def test_the_next_run_replaces_all_lists(tmp_path, registry, lake, without_ray):
    first = recommend.run(pipeline(tmp_path, registry))
    assert sorted(read_lists(lake)) == sorted(ALL)

    wanted = {"users": "sequences", "top_k": 3, "version": "v2"}
    second = recommend.run(pipeline(tmp_path, registry, **wanted))
    lists = read_lists(lake)
    assert sorted(lists) == sorted(HISTORIES)
    assert {len(row["item_ids"]) for row in lists.values()} == {3}
    assert {row["model_version"] for row in lists.values()} == {"v2"}
    versions = [one.figures["recommendations_version"] for one in (first, second)]
    assert versions == [1, 2]


def test_a_run_that_fails_leaves_the_lists_of_the_one_before(
    tmp_path, registry, lake, without_ray, monkeypatch
):
    recommend.run(pipeline(tmp_path, registry))
    before, table = read_lists(lake), tmp_path / "lake" / "recommendations"
    files = sorted(table.rglob("*.parquet"))

    def lose(*arguments, **named):
        raise ConflictError("Another job was first.")

    monkeypatch.setattr(recommend, "commit_parts", lose)
    with pytest.raises(ConflictError, match="first"):
        recommend.run(pipeline(tmp_path, registry))
    assert read_lists(lake) == before
    assert sorted(table.rglob("*.parquet")) == files


def test_of_two_runs_at_a_time_one_loses(tmp_path, registry, lake, without_ray, monkeypatch):
    recommend.run(pipeline(tmp_path, registry))
    make_all = recommend._make_all

    def be_late(config, order, buckets):
        monkeypatch.setattr(recommend, "_make_all", make_all)
        recommend.run(pipeline(tmp_path, registry, top_k=2))
        yield from make_all(config, order, buckets)

    monkeypatch.setattr(recommend, "_make_all", be_late)
    with pytest.raises(ConflictError):
        recommend.run(pipeline(tmp_path, registry, top_k=5))
    assert {len(row["item_ids"]) for row in read_lists(lake).values()} == {2}


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_is_killed_leaves_the_lists_of_the_one_before(
    tmp_path, registry, without_ray, ray_cluster
):
    lake, few = str(tmp_path / "lake"), sequences_table()
    many = pa.concat_tables([few] * 3_000)
    names = pa.array([f"u{n}" for n in range(many.num_rows)])
    many = many.set_column(0, "user_id", names)
    schema = sequences_schema("string", "string")
    write_buckets(lake, "sequences", many, schema, num_buckets=8)
    recommend.run(pipeline(tmp_path, registry, top_k=1))
    before = table_files(lake)

    (tmp_path / "toy.toml").write_text(KILLED.format(root=tmp_path))
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.recommend", "--config", str(tmp_path / "toy.toml")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "RAY_ADDRESS": address},
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while table_files(lake) == before:
        assert driver.poll() is None, "it ended before it wrote anything"
        assert time.monotonic() < end
        time.sleep(0.01)
    driver.kill()
    assert driver.wait(timeout=60) == -signal.SIGKILL

    assert open_table(lake, "recommendations").version() == 1
    lists = read_lists(lake)
    assert len(lists) == many.num_rows
    assert {len(row["item_ids"]) for row in lists.values()} == {1}


def table_files(lake):
    return set(Path(lake, "recommendations").rglob("*.parquet"))


def test_a_forgotten_user_leaves_the_lists_too(tmp_path, registry, lake, without_ray):
    recommend.run(pipeline(tmp_path, registry))
    assert forget_users(lake, "recommendations", ["ann"]) == 1
    assert sorted(read_lists(lake)) == sorted(set(ALL) - {"ann"})


def order_of(artifact, **changed):
    schema = recommendations_schema("string", "string")
    values = {
        "artifact": artifact.path,
        "lake_uri": "",
        "options": {},
        "schema": schema.remove(schema.get_field_index("user_bucket")),
        "created_us": START_US + 3_600_000_000,
        "top_k": 10,
        "filter_seen": True,
        "batch_size": 2,
        "history_events": HISTORY_EVENTS,
        "num_threads": 1,
        "device": "cpu",
    }
    return Order(**values | changed)


@pytest.fixture(scope="module")
def maker(registry):
    return ListMaker(load_artifact(registry / "v1"))


@pytest.fixture(scope="module")
def artifact(registry):
    return load_artifact(registry / "v1")


@pytest.mark.parametrize("batch_size", [1, 3, 512])
def test_lists_are_in_the_order_of_the_users_whoever_they_are_ranked_with(
    artifact, maker, batch_size
):
    users = sequences_table()
    rows = make_lists(maker, users, order_of(artifact, batch_size=batch_size)).to_pylist()
    alone = [maker.make([query])[0] for query in make_queries(users, order_of(artifact))]
    assert [row["user_id"] for row in rows] == list(HISTORIES)
    assert [row["item_ids"] for row in rows] == [list(one.item_ids) for one in alone]
    assert [row["source"] for row in rows] == [one.source for one in alone]


def test_items_of_the_history_are_left_out_unless_they_are_wanted(artifact, maker):
    users = sequences_table()
    for filter_seen in (True, False):
        order = order_of(artifact, filter_seen=filter_seen, top_k=40)
        for row in make_lists(maker, users, order).to_pylist():
            seen = set(HISTORIES[row["user_id"]][1]) & set(row["item_ids"])
            assert bool(seen) != filter_seen or row["source"] == "fallback"
            assert row["item_ids"]


def test_who_has_seen_everything_gets_it_again(maker):
    history = tuple(Event(f"i{n}") for n in range(40))
    (made,) = maker.make([Query(history, RequestContext(), 5)])
    assert (len(made.item_ids), made.source) == (5, "fallback")


def test_newcomers_of_a_segment_get_what_is_popular_in_it(maker):
    loyal, new, unknown = (
        maker.make([Query((), RequestContext(segment=segment))])[0]
        for segment in ("loyal", "new", None)
    )
    assert {one.source for one in (loyal, new, unknown)} == {"fallback"}
    assert len({one.item_ids for one in (loyal, new, unknown)}) == 3
    assert {len(one.item_ids) for one in (loyal, new, unknown)} == {10}


def test_a_version_with_other_ids_is_refused(tmp_path, registry):
    lake = str(tmp_path / "lake")
    create_table(lake, "sequences", sequences_schema("int64", "int64"), num_buckets=1)
    rows = pa.table(
        {
            "user_id": [1],
            "segment": pa.array([None], pa.string()),
            "item_ids": [[1]],
            "event_types": [["view"]],
            "timestamps": pa.array([[0]], pa.list_(pa.int64())).cast(pa.list_(TIMESTAMP)),
            "devices": pa.array([[None]], pa.list_(pa.string())),
        }
    )
    commit_parts(open_table(lake, "sequences"), [write_part(lake, "sequences", rows, 0)])
    with pytest.raises(JobError, match="item ids of type string, and the lake int64; name a ver"):
        recommend.run(pipeline(tmp_path, registry))
    assert not table_exists(lake, "recommendations")


def publish_with(registry, shop, root, variants):
    """The version v1 again, as if these had passed the gate of the export."""

    def write(folder):
        write_artifact(folder, shop=shop, seed=1)
        (folder / "export.json").write_text(
            json.dumps({"variants": {name: {} for name in variants}})
        )

    publish(root / "registry", "v1", write, {"seed": 1})


def test_a_variant_that_passed_the_export_makes_lists(tmp_path, registry, shop, lake, without_ray):
    publish_with(registry, shop, tmp_path, ["fp32", "bf16"])
    chosen = {"version": "v1", "users": "sequences"}
    scores = {}
    for variant in ("fp32", "bf16"):
        report = recommend.run(pipeline(tmp_path, registry, variant=variant, **chosen))
        scores[variant] = {user: row["scores"] for user, row in read_lists(lake).items()}
        assert report.figures["variant"] == variant
    for user, expected in scores["fp32"].items():
        assert scores["bf16"][user] == pytest.approx(expected, abs=0.2)
    assert scores["bf16"] != scores["fp32"]


def test_a_variant_that_did_not_pass_is_refused(tmp_path, registry, shop, lake):
    with pytest.raises(JobError, match=r"v1 was published without int8 \(it has no export\); name"):
        recommend.run(pipeline(tmp_path, registry, variant="int8"))
    publish_with(registry, shop, tmp_path / "other", ["fp32", "bf16"])
    (tmp_path / "registry").unlink()
    (tmp_path / "registry").symlink_to(tmp_path / "other" / "registry")
    with pytest.raises(JobError, match=r"v1 was published without int8 \(it has fp32, bf16\)"):
        recommend.run(pipeline(tmp_path, registry, variant="int8", version="v1"))
    assert not table_exists(lake, "recommendations")


def test_int8_on_a_gpu_is_refused():
    with pytest.raises(ValueError, match="int8 is for CPUs; set gpus_per_actor to 0, or take bf16"):
        RecommendConfig(variant="int8", gpus_per_actor=0.5)

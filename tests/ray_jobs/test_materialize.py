"""Histories of the lake in the store that serving reads."""

import asyncio
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs import materialize
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.sections.serving import ServeConfig
from ray_jobs.serve import _history_arguments
from serve_app.history_stores.opening import open_store
from tests.serve_app.redis_server import running_redis

REPOSITORY = Path(__file__).parents[2] / "cluster" / "feast"


def pipeline(tmp_path, **serve):
    return PipelineConfig(
        name="toy",
        storage={"root": str(tmp_path)},
        ingest={"events": [{"path": "none", "format": "csv", "columns": {}}]},
        serve=serve,
    )


def write_buckets(folder, num_buckets=3):
    """A user `u<n>` with the items `n` and `n + 1` in each bucket."""
    folder.mkdir()
    files = []
    for n in range(num_buckets):
        columns = {
            "user_id": [f"u{n}"],
            "item_ids": [[n, n + 1]],
            "event_types": [["view", None]],
            "timestamps": pa.array([[1, 2]], pa.list_(pa.timestamp("us", tz="UTC"))),
            "devices": [["mobile", None]],
        }
        files.append(folder / f"bucket-{n}.parquet")
        pq.write_table(pa.table(columns), files[-1])
    return files


def stored_items(user_id, kind, **address):
    async def read():
        store = open_store(kind, timeout_s=30, **address)
        events = await store.recent("user_id", user_id, 9)
        await store.close()
        return [event.item_id for event in events]

    return asyncio.run(read())


@pytest.mark.ray
def test_redis_is_filled_once_from_all_buckets(tmp_path, ray_cluster):
    files = write_buckets(tmp_path / "history")
    with running_redis() as server:
        config = pipeline(tmp_path, history="redis", redis_url=server.url)

        counts = [materialize._load(config, files) for _ in range(2)]

        assert counts == [3, 0]
        assert stored_items("u2", "redis", redis_url=server.url) == [2, 3]


@pytest.mark.ray
@pytest.mark.slow
def test_feast_is_filled_from_all_buckets(tmp_path, ray_cluster):
    files = write_buckets(tmp_path / "history")
    repo = Path(shutil.copytree(REPOSITORY, tmp_path / "feast"))
    yaml = (repo / "feature_store.yaml").read_text()
    # Ray's workers do not see this process's environment.
    (repo / "feature_store.yaml").write_text(yaml.replace("${NEXTITEM_HOME}", str(tmp_path)))

    count = materialize._load(pipeline(tmp_path, history="feast", feast_repo=str(repo)), files)

    assert count == 3
    assert stored_items("u2", "feast", feast_repo=repo) == [2, 3]


@pytest.mark.ray
def test_store_that_is_down_is_one_sentence(tmp_path, ray_cluster):
    files = write_buckets(tmp_path / "history", num_buckets=1)
    config = pipeline(tmp_path, history="redis", redis_url=f"unix://{tmp_path}/nobody.sock")

    with pytest.raises(JobError, match="Redis does not answer"):
        materialize._load(config, files)


def test_store_needs_its_address():
    with pytest.raises(ValueError, match=r"redis needs serve.redis_url"):
        ServeConfig(history="redis")
    with pytest.raises(ValueError, match=r"feast needs serve.feast_repo"):
        ServeConfig(history="feast")


def test_password_of_redis_is_not_shown_and_its_variable_is_passed_on(tmp_path):
    config = pipeline(tmp_path, history="redis", redis_url="redis://:pass@cache:6379")
    assert "redis://***@cache:6379" in config.model_dump_json()

    config = pipeline(tmp_path, history="redis", redis_url="$SHOP_REDIS")
    assert _history_arguments(config) == {"history": "redis", "redis_url": "$SHOP_REDIS"}

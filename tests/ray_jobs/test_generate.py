import json

import pyarrow.parquet as pq
import pytest

from data_lake.schemas import items_schema
from data_lake.synthetic import ShopConfig, build_shop
from data_lake.synthetic_events import generate_part
from data_lake.synthetic_rows import clean_rows, raw_schema, soil_rows
from ray_jobs import generate
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.sections.storage import StorageConfig

INGEST = {"events": [{"path": "events", "format": "parquet", "columns": {}}]}
SHOP = ShopConfig(num_users=60, num_items=40, num_categories=4, num_parts=3, broken_share=0.2)


def pipeline(tmp_path, *, shop=SHOP, seed=1):
    storage = StorageConfig(root=str(tmp_path / "shop"))
    return PipelineConfig(name="toy", seed=seed, storage=storage, generate=shop, ingest=INGEST)


@pytest.mark.ray
def test_writes_one_file_of_events_and_users_a_part(tmp_path, ray_cluster):
    report = generate.run(pipeline(tmp_path))
    raw = tmp_path / "shop" / "raw"
    events = pq.read_table(raw / "events")
    assert len(list((raw / "events").glob("*.parquet"))) == 3
    assert events.schema == raw_schema()
    assert pq.read_table(raw / "users").num_rows == 60
    assert pq.read_table(raw / "items.parquet").schema == items_schema("int64")
    lines = [
        json.loads(line)
        for file in (raw / "events-dirty").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert events.num_rows + len(lines) == report.figures["rows_with_dirt"]


@pytest.mark.ray
def test_many_workers_write_what_one_process_makes(tmp_path, ray_cluster):
    generate.run(pipeline(tmp_path))
    shop = build_shop(SHOP, seed=1)
    for part in range(SHOP.num_parts):
        rows, _ = soil_rows(clean_rows(shop, part, generate_part(shop, part)), shop, part)
        file = tmp_path / "shop" / "raw" / "events" / f"part-{part:05d}.parquet"
        assert pq.read_table(file).equals(rows)


@pytest.mark.ray
def test_a_second_run_leaves_the_files_alone(tmp_path, ray_cluster):
    first = generate.run(pipeline(tmp_path))
    file = tmp_path / "shop" / "raw" / "events" / "part-00000.parquet"
    before = file.stat().st_mtime_ns
    second = generate.run(pipeline(tmp_path))
    assert file.stat().st_mtime_ns == before
    assert "nothing to do" in second.headline
    assert second.figures["events"] == first.figures["events"]


@pytest.mark.ray
def test_a_run_that_was_cut_short_is_done_again(tmp_path, ray_cluster):
    generate.run(pipeline(tmp_path))
    stamp = tmp_path / "shop" / "raw" / "generated.json"
    half = json.loads(stamp.read_text())
    del half["figures"]
    stamp.write_text(json.dumps(half))
    (tmp_path / "shop" / "raw" / "items.parquet").unlink()
    generate.run(pipeline(tmp_path))
    assert (tmp_path / "shop" / "raw" / "items.parquet").exists()


@pytest.mark.ray
def test_another_shop_is_never_overwritten(tmp_path, ray_cluster):
    generate.run(pipeline(tmp_path))
    with pytest.raises(JobError, match=r"another shop \(num_items is 40 there, 50 here\)"):
        generate.run(pipeline(tmp_path, shop=SHOP.model_copy(update={"num_items": 50})))


def test_files_of_others_are_never_touched(tmp_path):
    (tmp_path / "shop" / "raw").mkdir(parents=True)
    with pytest.raises(JobError, match=r"was not generated; set storage\.root elsewhere"):
        generate.run(pipeline(tmp_path))


def test_without_a_section_there_is_no_shop(tmp_path):
    with pytest.raises(JobError, match=r"add a \[generate\] section"):
        generate.run(pipeline(tmp_path, shop=None))

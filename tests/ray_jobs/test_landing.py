"""Served events come into the lake by themselves, once."""

import asyncio

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_lake.tables import open_table, read_table
from ray_jobs import ingest
from ray_jobs.config import PipelineConfig
from serve_app.event_log import EventLog, LoggedEvent
from serve_app.shipping import Shipper

pytestmark = pytest.mark.ray

FIRST_US = 1_770_000_000_000_000


@pytest.fixture
def shop(tmp_path, ray_cluster):
    raw = {
        "user_id": [1],
        "item_id": [10],
        "event_type": ["view"],
        "timestamp": pa.array([FIRST_US], pa.timestamp("us", tz="UTC")),
    }
    pq.write_table(pa.table(raw), tmp_path / "raw.parquet")
    return tmp_path


@pytest.fixture
def log(tmp_path):
    log = EventLog(tmp_path / "history" / "events.sqlite")
    yield log
    log.close()


def pipeline(shop, **changes):
    columns = {name: name for name in ("user_id", "item_id", "event_type", "timestamp")}
    source = {"path": str(shop / "raw.parquet"), "format": "parquet", "columns": columns}
    given = {"user_id": "int64", "item_id": "int64", "num_buckets": 2, "events": [source]}
    return PipelineConfig(name="toy", storage={"root": str(shop)}, ingest={**given, **changes})


def event(number, user_id="1"):
    return LoggedEvent(f"e{number}", user_id, "s1", 10 + number, "view", FIRST_US + number)


def append(log, *events):
    asyncio.run(log.append(events))


def lake_items(shop):
    table = read_table(open_table(str(shop / "lake"), "events"))
    assert table.schema.field("item_id").type == pa.int64()
    return sorted(table["item_id"].to_pylist())


def test_served_events_are_taken_once_whatever_files_they_come_in(shop, log, monkeypatch):
    assert ingest.run(pipeline(shop)).figures["committed"] == 1
    append(log, event(1), event(2, "2"))
    with monkeypatch.context() as patch:
        patch.setattr(log, "advance", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Shipper(log, str(shop / "landing")).ship()
    assert ingest.run(pipeline(shop)).figures["committed"] == 2
    append(log, event(3))

    # The first two come again, beside what is new.
    Shipper(log, str(shop / "landing")).ship()
    figures = ingest.run(pipeline(shop)).figures

    assert (figures["read"], figures["committed"], figures["duplicate"]) == (3, 1, 2)
    assert lake_items(shop) == [10, 11, 12, 13]


def test_files_are_deleted_a_while_after_they_are_in_the_lake(shop, log):
    append(log, event(1))
    Shipper(log, str(shop / "landing")).ship()

    assert "landed_files_deleted" not in ingest.run(pipeline(shop, keep_landed_hours=0)).figures
    assert ingest.run(pipeline(shop)).figures["landed_files_deleted"] == 0
    again = ingest.run(pipeline(shop, keep_landed_hours=0)).figures

    assert again["landed_files_deleted"] == 1
    assert list((shop / "landing").iterdir()) == []
    assert lake_items(shop) == [10, 11]


def test_event_of_nobody_goes_to_quarantine(shop, log):
    append(log, event(1, None))
    Shipper(log, str(shop / "landing")).ship()

    assert ingest.run(pipeline(shop)).figures["quarantined"] == 1

"""Someone else's Delta table as the source of a whole ingest."""

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from data_lake.errors import SourceError
from data_lake.schemas import TIMESTAMP
from data_lake.tables import open_table, read_table
from ray_jobs import exchange, ingest
from ray_jobs.config import PipelineConfig

pytestmark = pytest.mark.ray

START_US = 1_750_000_000_000_000
DAY_US = 86_400_000_000
COLUMNS = {
    "event_id": "id",
    "user_id": "visitor",
    "item_id": "product",
    "event_type": "action",
    "timestamp": "at",
}


@pytest.fixture
def home(tmp_path, monkeypatch, ray_cluster):
    monkeypatch.setenv("HOME_OF_TEST", str(tmp_path))
    return tmp_path


def foreign_rows(numbers):
    """Events `e<n>`, each twenty minutes after the one before, of 37 users and 11 products."""
    return pa.table(
        {
            "id": [f"e{n}" for n in numbers],
            "visitor": [f"u{n % 37}" for n in numbers],
            "product": [n % 11 for n in numbers],
            "action": ["view"] * len(numbers),
            "at": pa.array([START_US + n * 1_200_000_000 for n in numbers]).cast(TIMESTAMP),
        }
    )


def config(columns=COLUMNS, **sources):
    source = {"path": "$HOME_OF_TEST/foreign", "format": "delta", "columns": columns} | sources
    tables = {"num_buckets": 8, "item_id": "int64", "events": [source]}
    return PipelineConfig(name="toy", storage={"root": "$HOME_OF_TEST"}, ingest=tables)


def counts(report):
    names = ("read", "committed", "duplicate", "quarantined")
    return tuple(report.figures[name] for name in names)


def read(home, name="events"):
    rows = read_table(open_table(str(home / "lake"), name)).to_pylist()
    return sorted(rows, key=lambda row: row.get("arrival", 0))


def test_an_unpartitioned_table_arrives_in_the_order_of_its_files(home):
    write_deltalake(home / "foreign", foreign_rows(range(200)))
    write_deltalake(home / "foreign", foreign_rows(range(150, 300)), mode="append")
    assert counts(ingest.run(config())) == (350, 300, 50, 0)
    assert [row["event_id"] for row in read(home)] == [f"e{n}" for n in range(300)]


def test_a_later_version_brings_its_new_events_only(home):
    write_deltalake(home / "foreign", foreign_rows(range(100)))
    ingest.run(config())
    assert ingest.run(config()).figures["files"] == 0
    write_deltalake(home / "foreign", foreign_rows(range(100, 130)), mode="append")
    assert counts(ingest.run(config())) == (130, 30, 100, 0)


def test_a_table_by_day_gives_its_partition_as_a_value(home):
    rows = foreign_rows(range(300))
    days = pa.compute.floor_temporal(rows["at"], unit="day").cast(pa.date32())
    write_deltalake(home / "foreign", rows.append_column("day", days), partition_by=["day"])
    by_day = {**COLUMNS, "timestamp": "day", "session_id": ("visitor", "day")}
    assert counts(ingest.run(config(by_day))) == (300, 300, 0, 0)
    events = {row["event_id"]: row for row in read(home)}
    times = {row["id"]: row["at"] for row in rows.to_pylist()}
    assert {key: row["timestamp"].date() for key, row in events.items()} == {
        key: time.date() for key, time in times.items()
    }
    assert events["e0"]["session_id"] == f"u0-{times['e0'].date()}"


def test_bad_rows_go_to_quarantine(home):
    rows = foreign_rows(range(20))
    users = pa.array([None, *rows["visitor"].to_pylist()[1:]])
    write_deltalake(home / "foreign", rows.set_column(1, "visitor", users))
    assert counts(ingest.run(config())) == (20, 19, 0, 1)
    (bad,) = read(home, "quarantine")
    assert bad["reason"] == "user_id is missing"
    assert '"id": "e0"' in bad["raw"]


def test_a_table_without_rows_is_an_error(home):
    write_deltalake(home / "foreign", foreign_rows(range(0)))
    with pytest.raises(SourceError, match="foreign has no rows, as all new files of events"):
        ingest.run(config())


def test_a_table_of_bad_rows_only_is_put_aside(home):
    rows = foreign_rows(range(20))
    write_deltalake(home / "foreign", rows.set_column(1, "visitor", pa.array([""] * 20)))
    assert counts(ingest.run(config())) == (20, 0, 0, 20)
    assert len(read(home, "quarantine")) == 20


def test_both_exchanges_make_the_same_table(home, monkeypatch):
    write_deltalake(home / "foreign", foreign_rows([*range(200), *range(100)]))
    ingest.run(config())
    shuffled = read(home)
    (home / "lake").rename(home / "shuffled")
    monkeypatch.setattr(ingest, "exchange_by_shuffle", exchange.exchange_pieces)
    ingest.run(config())
    names = [name for name in shuffled[0] if name != "ingested_at"]
    assert [[row[name] for name in names] for row in read(home)] == [
        [row[name] for name in names] for row in shuffled
    ]


def test_a_broken_file_stops_the_job_with_its_sentence_and_leaves_nothing(home):
    rows = foreign_rows(range(5000))
    users = pa.array([None, *rows["visitor"].to_pylist()[1:]])
    write_deltalake(home / "foreign", rows.set_column(1, "visitor", users))
    (file,) = (home / "foreign").glob("*.parquet")
    content = bytearray(file.read_bytes())
    content[4:40] = b"\xff" * 36
    file.write_bytes(content)
    with pytest.raises(SourceError, match=r"(?s)parquet cannot be read \(.*\); deliver it again"):
        ingest.run(config())
    assert open_table(str(home / "lake"), "events").version() == 0
    assert not list((home / "lake").rglob("*.parquet"))

import asyncio

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serve_app.errors import SettingsError
from serve_app.event_log import EventLog
from serve_app.history_stores.seeds import find_seed, load_seed
from serve_app.history_stores.sqlite_history import SqliteHistory

US = pa.timestamp("us", tz="UTC")


@pytest.fixture
def history(tmp_path):
    log = EventLog(tmp_path / "history.sqlite")
    yield SqliteHistory(log)
    log.close()


def table(user_id="u1", kind=US, **changes):
    columns = {
        "user_id": [user_id],
        "item_ids": [["a", "b"]],
        "event_types": [["view", None]],
        "timestamps": pa.array([[1, 2]], pa.list_(kind)),
        "devices": [["mobile", None]],
    }
    return pa.table({**columns, **changes})


@pytest.mark.parametrize("kind", [US, pa.timestamp("us"), pa.int64()])
def test_seed_file_fills_the_history_once(history, tmp_path, kind):
    pq.write_table(table(kind=kind), tmp_path / "seed.parquet")

    assert load_seed(history, tmp_path / "seed.parquet") == 1
    assert load_seed(history, tmp_path / "seed.parquet") == 0
    assert asyncio.run(history.recent("user_id", "u1", 9)) == (
        ("a", 1, "view", "mobile"),
        ("b", 2, None, None),
    )


def test_seed_may_be_a_folder(history, tmp_path):
    (tmp_path / "seed").mkdir()
    for number in (1, 2):
        pq.write_table(table(f"u{number}"), tmp_path / "seed" / f"part-{number}.parquet")

    assert load_seed(history, tmp_path / "seed") == 2


def test_seed_that_lacks_a_column_names_it(history, tmp_path):
    pq.write_table(table().drop_columns(["devices"]), tmp_path / "seed.parquet")

    with pytest.raises(SettingsError, match=r"seed.parquet lacks devices; it needs user_id"):
        load_seed(history, tmp_path / "seed.parquet")


def test_seed_is_looked_for_in_the_artifact(tmp_path):
    assert find_seed(None, tmp_path) is None
    (tmp_path / "history_seed.parquet").touch()
    assert find_seed(None, tmp_path) == tmp_path / "history_seed.parquet"
    with pytest.raises(SettingsError, match="nowhere does not exist"):
        find_seed(tmp_path / "nowhere", tmp_path)

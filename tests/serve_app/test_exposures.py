import time

import pyarrow as pa
import pyarrow.parquet as pq

from serve_app.exposures import SCHEMA, Exposure, ExposureLog
from serve_app.metrics import Metrics


def make_exposure(number):
    return Exposure(
        f"r{number}", f"u{number}", None, number, "v1", "model", False, ("i1", f"i{number}"), 0.5
    )


def read_all(folder):
    files = sorted(folder.glob("*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in files]).sort_by("timestamp")


def test_lists_are_written_before_the_log_closes(tmp_path):
    log = ExposureLog(str(tmp_path), Metrics(), every_s=3600)
    for number in range(5):
        log.add(make_exposure(number))
    log.close()

    table = read_all(tmp_path)
    assert table.schema == SCHEMA
    assert table["recommendation_id"].to_pylist() == [f"r{number}" for number in range(5)]
    assert table["item_ids"].to_pylist()[3] == ["i1", "i3"]
    assert table["top_score"].to_pylist() == [0.5] * 5
    assert list(tmp_path.glob(".*")) == []


def test_lists_are_written_every_few_seconds(tmp_path):
    log = ExposureLog(str(tmp_path), Metrics(), every_s=0.01)
    for number in range(2):
        log.add(make_exposure(number))
        end = time.monotonic() + 20
        while len(list(tmp_path.glob("*.parquet"))) <= number:
            assert time.monotonic() < end, "nothing was written"
            time.sleep(0.01)
    log.close()

    assert read_all(tmp_path).num_rows == 2


def test_lists_wait_while_the_folder_cannot_be_written(tmp_path, caplog):
    metrics = Metrics()
    log = ExposureLog(str(tmp_path), metrics, every_s=3600)
    log.add(make_exposure(0))
    log._root = str(tmp_path / "gone")
    log._write_waiting()
    assert "1 exposures cannot be written now" in caplog.text

    log._root = str(tmp_path)
    log.add(make_exposure(1))
    log.close()

    assert read_all(tmp_path)["recommendation_id"].to_pylist() == ["r0", "r1"]
    assert b'nextitem_exposures_total{outcome="logged"} 2.0' in metrics.render()


def test_every_answer_is_logged_with_its_id_and_version(open_front, tmp_path):
    front = open_front()
    log = ExposureLog(str(tmp_path / "exposures"), front.recommender.metrics, every_s=3600)
    front.recommender._exposures = log
    answers = [
        front.recommend(user_id=7, context={"timestamp": 1_000_000_000}),
        front.recommend(session_id="s1"),
        front.recommend(user_history=["i1"], top_k=3),
    ]
    front.client.post("/v1/similar", json={"item_id": "i1"})
    front.client.runner.run(front.recommender.close())

    rows = read_all(tmp_path / "exposures").to_pylist()
    for answer, row in zip(answers, rows, strict=True):
        assert row["recommendation_id"] == answer["recommendation_id"]
        assert row["item_ids"] == [entry["item_id"] for entry in answer["recommendations"]]
        assert (row["model_version"], row["source"]) == ("v1", answer["source"])
        is_ranked = answer["source"] == "model"
        assert row["top_score"] == (answer["recommendations"][0]["score"] if is_ranked else None)
    assert [row["user_id"] for row in rows] == ["7", None, None]
    assert [row["session_id"] for row in rows] == [None, "s1", None]
    assert {row["timestamp"].timestamp() for row in rows} == {front.now_s}

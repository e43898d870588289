"""What a training tells while it runs."""

import json
import math
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from ray_jobs import run_log
from ray_jobs.run_log import RunLog, describe


def epoch(number, **changes):
    report = {"epoch": number, "loss": 2.5, "ndcg10": 0.125, "hr10": 0.25, "windows_per_s": 90.0}
    return report | {"tokens_per_s": 4321.0, "learning_rate": 1e-3} | changes


def read_scalars(folder):
    """(tag, step) -> value, from the records of the event files: length, checksum, content,
    checksum.
    """
    scalars = {}
    for path in folder.iterdir():
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + length])
            scalars |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            place += 16 + length
    return scalars


@pytest.fixture
def gauges(monkeypatch):
    """Values that were set last, by name and run."""
    values = {}

    class FakeGauge:
        def __init__(self, name, description, tag_keys):
            assert description
            assert tag_keys == ("run",)
            self.name = name

        def set_default_tags(self, tags):
            self.tags = tags

        def set(self, value):
            values[self.name, self.tags["run"]] = value

    monkeypatch.setattr(run_log, "Gauge", FakeGauge)
    return values


def test_epochs_are_kept_as_history_and_for_tensorboard(tmp_path, gauges):
    log = RunLog(tmp_path, max_epochs=3)
    for number in (1, 2):
        log.after_report(None, [epoch(number, standing=number), {"epoch": 99}], None)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [epoch(1), epoch(2)]
    scalars = read_scalars(tmp_path / "tensorboard")
    assert scalars["train/ndcg10", 1] == scalars["train/ndcg10", 2] == 0.125
    assert scalars["train/learning_rate", 2] == pytest.approx(1e-3)
    assert gauges["nextitem_train_epoch", tmp_path.name] == 2
    assert gauges["nextitem_train_tokens_per_s", tmp_path.name] == 4321


def test_what_was_not_measured_is_not_shown(tmp_path, gauges, capsys):
    RunLog(tmp_path, max_epochs=3).after_report(None, [epoch(1, ndcg10=math.nan)], None)
    assert "not validated" in capsys.readouterr().out
    assert ("train/ndcg10", 1) not in read_scalars(tmp_path / "tensorboard")
    assert ("nextitem_train_ndcg10", tmp_path.name) not in gauges


def test_progress_within_an_epoch_is_told_and_is_no_epoch(tmp_path, gauges, capsys):
    report = {"epoch": 4, "step": 50, "steps": 200, "loss": 1.5, "tokens_per_s": 10_000.0}
    RunLog(tmp_path, max_epochs=9).after_report(None, [report], None)
    assert capsys.readouterr().out == "epoch 5/9, step 50/200  loss 1.5000  10,000 tokens/s\n"
    assert not (tmp_path / "history.jsonl").exists()
    assert gauges["nextitem_train_loss", tmp_path.name] == 1.5


@pytest.mark.usefixtures("gauges")
def test_the_time_that_is_left_goes_by_the_pace_of_this_start(tmp_path, capsys):
    moments = iter([100.0, 130.0])
    log = RunLog(tmp_path, max_epochs=10, clock=lambda: next(moments))
    for number in (4, 6):
        log.after_report(None, [epoch(number)], None)
    first, second = capsys.readouterr().out.splitlines()
    assert "to go" not in first
    assert second.endswith("at most 60 s to go")


def test_a_report_is_one_line():
    assert describe(epoch(2), 30, 12.4) == (
        "epoch 2/30  loss 2.5000  NDCG@10 0.1250  4,321 tokens/s  at most 12 s to go"
    )

"""What a training tells while it runs: a line for a person, `history.jsonl`, TensorBoard, and
gauges that Ray exports to Prometheus and its dashboard.

Workers report to Ray Train's controller, which runs on the node of the driver: only that node has
to see the run folder.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, UserCallback
from ray.util.metrics import Gauge
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from ray_jobs.train_worker import STANDING

_GAUGES = {
    "loss": "Loss of the last epoch, or of what is done of it.",
    "ndcg10": "NDCG@10 of the last validation.",
    "tokens_per_s": "Training events a second, over all workers.",
    "epoch": "Epochs that are done.",
}


class RunLog(UserCallback):  # type: ignore[misc]
    """Keeps the reports of a run, see `ray_jobs.train.train_worker`.

    Args:
        run: folder of the run.
        max_epochs: of the plan, for the time that is left at most.
        clock: seconds from any origin.
    """

    def __init__(
        self, run: Path, max_epochs: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run, self._max_epochs, self._clock = run, max_epochs, clock
        # Made where the reports arrive, which is another process.
        self._writer: EventsWriter | None = None
        self._gauges: dict[str, Gauge] = {}
        self._first: tuple[float, float] | None = None

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Called by Ray Train when every worker has reported; the first one's counts."""
        report = {name: value for name, value in metrics[0].items() if name != STANDING}
        is_whole = "step" not in report
        if is_whole:
            with (self._run / "history.jsonl").open("a") as file:
                file.write(json.dumps(report) + "\n")
            self._write_events(report)
        self._set_gauges(report)
        print(describe(report, self._max_epochs, self._seconds_left(report)), flush=True)

    def _seconds_left(self, report: dict[str, Any]) -> float | None:
        """At the pace since the first report; None at that one."""
        done = report["epoch"] + report.get("step", 0) / report.get("steps", 1)
        if self._first is None:
            self._first = self._clock(), done
        since, done_then = self._first
        if done <= done_then:
            return None
        left: float = (self._clock() - since) / (done - done_then) * (self._max_epochs - done)
        return left

    def _write_events(self, report: dict[str, Any]) -> None:
        # Without the queue of SummaryWriter, whose end is lost when the process is.
        if self._writer is None:
            folder = self._run / "tensorboard"
            folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(folder / f"events.out.tfevents.{time.time_ns()}"))
        for name, value in report.items():
            if name != "epoch" and value == value:  # a metric that was not measured is no number
                summary = scalar(f"train/{name}", value)
                event = Event(wall_time=time.time(), step=report["epoch"], summary=summary)
                self._writer.write_event(event)
        self._writer.flush()

    def _set_gauges(self, report: dict[str, Any]) -> None:
        for name, description in _GAUGES.items():
            if name not in self._gauges:
                gauge = Gauge(f"nextitem_train_{name}", description, tag_keys=("run",))
                gauge.set_default_tags({"run": self._run.name})
                self._gauges[name] = gauge
            value = report.get(name)
            if value is not None and value == value:
                self._gauges[name].set(float(value))


def describe(report: dict[str, Any], max_epochs: int, seconds_left: float | None) -> str:
    """A report as one line."""
    words = [f"epoch {report['epoch']}/{max_epochs}"]
    if "step" in report:
        step = f"step {report['step']}/{report['steps']}"
        words = [f"epoch {report['epoch'] + 1}/{max_epochs}, {step}"]
    words.append(f"loss {report['loss']:.4f}")
    if "step" not in report:
        is_validated = report["ndcg10"] == report["ndcg10"]
        words.append(f"NDCG@10 {report['ndcg10']:.4f}" if is_validated else "not validated")
    words.append(f"{report['tokens_per_s']:,.0f} tokens/s")
    if seconds_left is not None:
        words.append(f"at most {seconds_left:.0f} s to go")
    return "  ".join(words)

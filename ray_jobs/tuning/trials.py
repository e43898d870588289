"""What a search has tried: a file with one line an event, which outlives the driver.

The file is the memory of the search. Every line is written at once and is whole or, after a kill,
cut off at the end, where it is passed over. Whoever proposes the next trial reads all of it, so
that a search that goes on knows what it knew.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from ray_jobs.tuning.space import Values

Ending: TypeAlias = Literal["finished", "stopped", "cut-off", "failed", "out-of-memory", "lost"]
"""finished: to the end of its plan; stopped: early, by the scheduler; cut-off: by the budget;
failed: by its own values, e.g. a loss that is not finite; out-of-memory: did not fit; lost: its
process went away for a reason that says nothing of its values."""


@dataclass(frozen=True)
class Epoch:
    """A validation of a trial."""

    epoch: int
    ndcg10: float
    error: float
    """Standard error of `ndcg10` over the validation users."""
    loss: float
    seconds: float
    """Since the trial began."""


@dataclass(frozen=True)
class Trial:
    """A recipe that was tried, or is."""

    number: int
    """From 0, in the order of the proposals."""
    values: Values
    origin: str
    """Who proposed it, e.g. "tpe"."""
    started_s: float
    """Seconds since 1970."""
    epochs: tuple[Epoch, ...] = ()
    ending: Ending | None = None
    """None: it runs, or the driver died before it ended."""
    reason: str = ""
    """Why it failed."""
    ended_s: float = math.nan
    notes: tuple[str, ...] = field(default=())
    """What happened when it was proposed."""

    @property
    def best(self) -> Epoch | None:
        """The epoch that would be kept, None before the first validation."""
        return max(self.epochs, key=lambda one: one.ndcg10, default=None)

    @property
    def objective(self) -> float:
        """NDCG@10 of the best epoch, NaN before the first validation."""
        return math.nan if self.best is None else self.best.ndcg10

    @property
    def counts(self) -> bool:
        """Whether its figure stands for its recipe."""
        return self.ending in ("finished", "stopped", "cut-off") and self.best is not None


class TrialLog:
    """The file of a search. It keeps nothing in memory, so that copies of it are the same."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(
        self, number: int, values: Values, origin: str, now_s: float, notes: Sequence[str] = ()
    ) -> None:
        """A trial begins; one with that number that did not end begins anew."""
        told = {"values": values, "origin": origin, "notes": list(notes)}
        self._append({"event": "start", "number": number, "at": now_s, **told})

    def report(self, number: int, epoch: Mapping[str, Any]) -> None:
        """A validation of it; keys as in `Epoch`."""
        self._append({"event": "epoch", "number": number, **epoch})

    def end(self, number: int, ending: Ending, now_s: float, reason: str = "") -> None:
        """It ended."""
        told = {"ending": ending, "reason": reason}
        self._append({"event": "end", "number": number, "at": now_s, **told})

    def read(self) -> list[Trial]:
        """All trials by number."""
        if not self._path.exists():
            return []
        trials: dict[int, Trial] = {}
        for line in self._path.read_text().splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off by a kill
            trials[event["number"]] = _apply(trials.get(event["number"]), event)
        return [trials[number] for number in sorted(trials)]

    def _append(self, event: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # A line that a kill cut off must not swallow this one.
        text = f"{'' if self._ends_with_a_line() else chr(10)}{json.dumps(event)}\n"
        with self._path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _ends_with_a_line(self) -> bool:
        if not self._path.exists() or self._path.stat().st_size == 0:
            return True
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def _apply(trial: Trial | None, event: Mapping[str, Any]) -> Trial:
    if event["event"] == "start":
        notes = tuple(event["notes"])
        values, origin = event["values"], event["origin"]
        return Trial(event["number"], values, origin, event["at"], notes=notes)
    assert trial is not None, f"trial {event['number']} was never started"
    if event["event"] == "epoch":
        epoch = Epoch(**{name: event[name] for name in Epoch.__dataclass_fields__})
        return replace(trial, epochs=(*trial.epochs, epoch))
    if trial.ending is not None:
        return trial  # whatever befell its process afterwards
    ended = {"ending": event["ending"], "reason": event["reason"], "ended_s": event["at"]}
    return replace(trial, **ended)


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The one with the highest objective among those that count."""
    counting = [trial for trial in trials if trial.counts]
    return max(counting, key=lambda trial: trial.objective, default=None)


def busy_seconds(trials: Sequence[Trial]) -> float:
    """Time in which one trial at least ran; of one that did not end, until its last validation."""
    spans = []
    for trial in trials:
        ran_s = trial.epochs[-1].seconds if trial.epochs else 0.0
        end_s = trial.started_s + ran_s if math.isnan(trial.ended_s) else trial.ended_s
        spans.append((trial.started_s, end_s))
    busy, until = 0.0, -math.inf
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def trials_table(trials: Sequence[Trial]) -> pa.Table:
    """A row a trial; `value.<path>` for each parameter, null where it took no part."""
    paths = sorted({path for trial in trials for path in trial.values})
    columns: dict[str, Any] = {
        "number": [trial.number for trial in trials],
        "origin": [trial.origin for trial in trials],
        "ending": [trial.ending for trial in trials],
        "reason": [trial.reason for trial in trials],
        "ndcg10": [_or_none(trial.objective) for trial in trials],
        "ndcg10_error": [None if trial.best is None else trial.best.error for trial in trials],
        "best_epoch": [None if trial.best is None else trial.best.epoch for trial in trials],
        "epochs": [trial.epochs[-1].epoch if trial.epochs else 0 for trial in trials],
        "seconds": [_or_none(trial.ended_s - trial.started_s) for trial in trials],
        "curve": [[epoch.ndcg10 for epoch in trial.epochs] for trial in trials],
        "curve_epochs": [[epoch.epoch for epoch in trial.epochs] for trial in trials],
    }
    for path in paths:
        columns[f"value.{path}"] = _column([trial.values.get(path) for trial in trials])
    return pa.table(columns)


def _column(values: list[Any]) -> pa.Array:
    """Of one type; as text where a choice mixes several."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and len(kinds) == 2:
        return pa.array([None if value is None else float(value) for value in values])
    if len(kinds) > 1:
        return pa.array([None if value is None else str(value) for value in values])
    return pa.array(values)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value

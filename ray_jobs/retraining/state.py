"""How far a retraining has come, in a file that a later process goes on from.

<root>/retrains/<name>/state.json   the finished steps with what they found
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.retraining.gates import Verdict
from ray_jobs.sections.storage import expand

_STATE = "state.json"


@dataclass(frozen=True)
class Done:
    """A step that came to its end."""

    figures: Mapping[str, Any]
    verdicts: tuple[Verdict, ...]
    seconds: float


@dataclass(frozen=True)
class State:
    """A retraining; what it began with stays, whatever serves or whatever time it is later."""

    name: str
    as_of: datetime
    champion: str
    steps: Mapping[str, Done] = field(default_factory=dict)
    """The finished ones, in their order."""

    @property
    def run(self) -> str:
        """Name of the training run."""
        return f"retrain-{self.name}"

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        return tuple(verdict for done in self.steps.values() for verdict in done.verdicts)

    @property
    def closed(self) -> Verdict | None:
        """The first gate that it did not pass."""
        return next((verdict for verdict in self.verdicts if not verdict.passed), None)

    def with_step(self, name: str, done: Done) -> "State":
        """The same with one more finished step."""
        return replace(self, steps={**self.steps, name: done})

    def facts(self) -> dict[str, Any]:
        """The same as JSON."""
        return {**asdict(self), "as_of": self.as_of.isoformat()}


def retrains_folder(config: PipelineConfig) -> Path:
    """Where all retrainings are. Raises: JobError when that is no folder."""
    root = expand(config.storage.root)
    if "://" in root:
        raise JobError(
            f"A retraining keeps its state in a folder, not in {root}; set storage.root to one, "
            "and storage.lake for the tables."
        )
    return Path(root) / "retrains"


def read_state(folder: Path) -> State | None:
    """What a retraining has finished; None where it has yet to begin.

    Raises: JobError when the file is damaged.
    """
    path = folder / _STATE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        steps = {name: _parse_step(step) for name, step in content["steps"].items()}
        as_of = datetime.fromisoformat(content["as_of"])
        return State(content["name"], as_of, content["champion"], steps)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError(
            f"{path} is damaged ({error}); give retrain.name another value, which begins anew."
        ) from error


def write_state(folder: Path, state: State) -> None:
    """Replaces the file at once."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{_STATE}-{os.getpid()}"
    temporary.write_text(json.dumps(state.facts(), indent=1))
    os.replace(temporary, folder / _STATE)


def _parse_step(step: Mapping[str, Any]) -> Done:
    verdicts = tuple(Verdict(**verdict) for verdict in step["verdicts"])
    return Done(step["figures"], verdicts, step["seconds"])

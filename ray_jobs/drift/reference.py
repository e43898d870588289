"""What stays the same for as long as a version serves, so that its reports can be compared: the
reference period, and the edges that scores are counted between.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_jobs.errors import JobError
from ray_jobs.sections.upkeep import MonitorConfig

REFERENCE = "reference.json"


@dataclass(frozen=True)
class Reference:
    """The content of reference.json."""

    settings: dict[str, Any]
    """See `describe_settings`; with others, a reference is chosen again."""
    until_us: int
    score_edges: tuple[float, ...]


def describe_settings(monitor: MonitorConfig, version: str) -> dict[str, Any]:
    """What a reference belongs to: the version that serves, and how long its windows are."""
    chosen = {"days", "reference_windows", "reference_until"}
    return {"version": version, **monitor.model_dump(mode="json", include=chosen)}


def read_reference(folder: Path, settings: dict[str, Any]) -> Reference | None:
    """The reference of earlier runs with the same settings; None where there is none.

    Raises: JobError when the file is damaged.
    """
    path = folder / REFERENCE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        if content["settings"] != settings:
            return None
        edges = tuple(map(float, content["score_edges"]))
        return Reference(settings, int(content["until_us"]), edges)
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(
            f"{path} is damaged ({error!r}); delete it, and the reference period is chosen again."
        ) from None


def write_reference(folder: Path, reference: Reference) -> None:
    """Replaces the file at once; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "settings": reference.settings,
        "until_us": reference.until_us,
        "score_edges": list(reference.score_edges),
    }
    temporary = folder / f".{REFERENCE}-{os.getpid()}"
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, folder / REFERENCE)

"""Since when a canary is compared, and what each look found, in a file that the next look goes on
from: `<root>/canaries/<canary>-over-<champion>.json`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.sections.storage import expand
from recsys.registry import Serving


@dataclass(frozen=True)
class Watch:
    """A canary beside its champion, with the same share all the time."""

    canary: str
    champion: str
    share: float
    """Of the canary among the visitors of both."""
    start_us: int
    """Lists from then on count, microseconds in UTC."""
    looks: tuple[Mapping[str, Any], ...] = ()

    @property
    def is_over(self) -> bool:
        """Whether the last look ended it; who serves again begins anew."""
        return bool(self.looks) and self.looks[-1]["decision"] != "wait"

    def days_until(self, moment: datetime) -> float:
        """Since it began; 0 before."""
        return max(0.0, (moment.timestamp() - self.start_us / 1e6) / 86_400)

    def with_look(self, look: Mapping[str, Any]) -> "Watch":
        """The same with one more look."""
        return replace(self, looks=(*self.looks, look))


def open_watch(config: PipelineConfig, serving: Serving, canary: str, now: datetime) -> Watch:
    """The watch of this canary as far as it has come, or a new one: visitors who moved between the
    versions when a share was changed can be compared no more.

    Raises: JobError when its file is damaged.
    """
    share = _share_among_both(serving, canary)
    found = _read(_path(config, canary, serving.champion))
    if found is not None and not found.is_over and abs(found.share - share) < 1e-9:
        return found
    start = config.canary.start or now + timedelta(minutes=config.canary.settle_minutes)
    return Watch(canary, serving.champion, share, round(start.timestamp() * 1e6))


def write_watch(config: PipelineConfig, watch: Watch) -> Path:
    """Replaces the file at once, and returns where it is."""
    path = _path(config, watch.canary, watch.champion)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    start = datetime.fromtimestamp(watch.start_us / 1e6, UTC)
    content = {"start": start.isoformat(timespec="seconds"), **asdict(watch)}
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)
    return path


def _share_among_both(serving: Serving, canary: str) -> float:
    ours, theirs = serving.share_of(canary), serving.share_of(serving.champion)
    return ours / (ours + theirs)


def _path(config: PipelineConfig, canary: str, champion: str) -> Path:
    root = expand(config.storage.root)
    if "://" in root:
        raise JobError(
            f"What a look at a canary found is kept in a folder, not in {root}; set storage.root "
            "to one, and storage.lake for the tables."
        )
    return Path(root) / "canaries" / f"{canary}-over-{champion}.json"


def _read(path: Path) -> Watch | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        del content["start"]
        return Watch(**{**content, "looks": tuple(content["looks"])})
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(
            f"{path} is damaged ({error}); delete it, and the comparison begins anew."
        ) from error

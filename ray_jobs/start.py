"""The version that a training starts from: found and checked before any data is read, then grown to
the vocabulary of now and left in the run folder for the workers.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.sections.models import StartConfig
from ray_jobs.sections.storage import expand
from ray_jobs.sequences_reader import Vocabulary
from ray_jobs.start_weights import StartWeights
from recsys.artifact import Artifact, load_artifact
from recsys.growth import grow_weights, refuse_other_architecture
from recsys.recipe import Recipe
from recsys.registry import list_versions, serving_version

SERVING = "serving"
_RECORD = "start.json"


@dataclass(frozen=True)
class Start:
    """A published version that fits the configuration."""

    config: StartConfig
    artifact: Artifact

    @property
    def trained_until_us(self) -> int:
        """Time of the version's last training event, microseconds in UTC."""
        until_us: int = self.artifact.manifest["trained_until_us"]
        return until_us

    @property
    def new_since_s(self) -> int | None:
        """Only events from then on are targets, seconds since the epoch; None: all are."""
        return self.trained_until_us // 1_000_000 if self.config.new_events_only else None

    def facts(self) -> dict[str, Any]:
        """The lineage of a run that starts here."""
        return {
            "version": self.artifact.version,
            "path": str(self.artifact.path),
            "weights_sha256": self.artifact.manifest["files"]["model.safetensors"],
            "trained_until": _as_text(self.trained_until_us),
            "new_events_only": self.config.new_events_only,
        }

    def write(self, folder: Path, vocabulary: Vocabulary, seed: int) -> StartWeights:
        """Leaves what the run started from and the grown weights in its folder."""
        known = vocabulary
        grown = grow_weights(
            self.artifact, known.catalogue, known.context, known.attributes, seed=seed
        )
        record = {"asked": self.config.model_dump(mode="json"), **self.facts()}
        (folder / _RECORD).write_text(json.dumps(record, indent=1))
        return StartWeights.write(grown, folder)


def open_start(config: PipelineConfig, recipe: Recipe, folder: Path) -> Start | None:
    """The version that the run in `folder` starts from, None without `[train.start]`.

    A run that goes on keeps the version that it began with, whichever serves by now.

    Raises: JobError or ArtifactError when there is no such version, or it does not fit.
    """
    has_begun = (folder / "history.jsonl").exists()
    record = _read_record(folder) if has_begun else None
    if has_begun:
        _refuse_another_start(folder.name, record, config.train.start)
    if config.train.start is None:
        return None
    path = _find(config, config.train.start) if record is None else Path(record["path"])
    artifact = load_artifact(path)
    refuse_other_architecture(artifact, recipe.model, config.train.context, config.train.attributes)
    if artifact.manifest.get("trained_until_us") is None:
        raise JobError(
            f"Version {artifact.version} does not say until when it was trained; start from a "
            "version that was trained and published since runs record trained_until_us."
        )
    start = Start(config.train.start, artifact)
    _refuse_trained_validation(config, start)
    return start


def _find(config: PipelineConfig, start: StartConfig) -> Path:
    if "/" in start.artifact:
        return Path(expand(start.artifact))
    registry = Path(config.storage.registry_uri)
    version = serving_version(registry) if start.artifact == SERVING else start.artifact
    versions = list_versions(registry)
    if version not in versions:
        raise JobError(
            f"train.start.artifact names version {version!r}, which is not in {registry}; it "
            f"holds: {', '.join(versions) or 'none'}."
        )
    return registry / version


def _refuse_another_start(
    run: str, record: dict[str, Any] | None, asked: StartConfig | None
) -> None:
    began = None if record is None else StartConfig.model_validate(record["asked"])
    if began != asked:
        raise JobError(
            f"The run {run!r} began with {_describe(began)} and cannot go on with "
            f"{_describe(asked)}; configure the same, or give train.name another value."
        )


def _refuse_trained_validation(config: PipelineConfig, start: Start) -> None:
    """What is held back now must not be what the version was trained on."""
    version, split = start.artifact.version, config.split
    if split.kind == "temporal-cut":
        assert split.validation_from is not None
        if split.validation_from.timestamp() * 1_000_000 <= start.trained_until_us:
            raise JobError(
                f"Version {version} was trained on events until "
                f"{_as_text(start.trained_until_us)}, and split.validation_from is "
                f"{split.validation_from.isoformat()}; choose a later date."
            )
        return
    pipeline = start.artifact.manifest["pipeline"]
    before = pipeline["split"]["kind"], sorted(pipeline["train"]["targets"]["event_types"])
    if before != (split.kind, sorted(config.train.targets.event_types)):
        raise JobError(
            f"Version {version} was trained with split.kind {before[0]!r} and the targets "
            f"{', '.join(before[1]) or 'of every type'}, so it knows events that {split.kind!r} "
            "would hold back now; configure the same, or a temporal-cut after "
            f"{_as_text(start.trained_until_us)}."
        )


def _read_record(folder: Path) -> dict[str, Any] | None:
    path = folder / _RECORD
    record: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return record


def _describe(start: StartConfig | None) -> str:
    return "random weights" if start is None else f"train.start = {start.model_dump_json()}"


def _as_text(moment_us: int) -> str:
    return datetime.fromtimestamp(moment_us / 1_000_000, UTC).isoformat(timespec="seconds")

"""Finished runs on disk: which there are, and what one of them holds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.sequences_reader import Vocabulary
from recsys.artifact import ATTRIBUTES, load_model, sha256_of
from recsys.attributes import AttributeEncoder
from recsys.catalogue import Catalogue
from recsys.context import ContextEncoder
from recsys.model import NextItemModel
from recsys.targets import TargetEvents, TargetsConfig, find_targets

EXPORT = "export"
"""Folder of a run that `ray_jobs.export` writes."""


@dataclass(frozen=True)
class FinishedRun:
    """A run folder that `ray_jobs.train` completed."""

    folder: Path
    facts: dict[str, Any]
    """The content of `run.json`."""
    vocabulary: Vocabulary

    def load_model(self) -> NextItemModel:
        known = self.vocabulary
        return load_model(self.folder, known.catalogue, known.context, known.attributes)

    @property
    def targets_config(self) -> TargetsConfig:
        """Which events the model was trained to predict."""
        # Runs from before there was a choice recorded none.
        return TargetsConfig.model_validate(self.facts["config"]["train"].get("targets", {}))

    @property
    def targets(self) -> TargetEvents | None:
        """The same as codes; None: every event."""
        return find_targets(self.targets_config, self.vocabulary.context)

    def evaluation(self) -> dict[str, Any]:
        """What `ray_jobs.evaluate` wrote. Raises JobError when it has not run."""
        content: dict[str, Any] = json.loads(self._evaluated("evaluation.json").read_text())
        return content

    def ranks(self) -> pa.Table:
        """Each target's rank under each row. Raises JobError when the run was not evaluated."""
        return pq.read_table(self._evaluated("ranks.parquet"))

    def exported(self) -> dict[str, Any] | None:
        """What `ray_jobs.export` wrote for these very weights; None where it has not run."""
        path = self.folder / EXPORT / "export.json"
        if not path.exists():
            return None
        facts: dict[str, Any] = json.loads(path.read_text())
        weights_sha256 = sha256_of(self.folder / "model.safetensors")
        return facts if facts["weights_sha256"] == weights_sha256 else None

    def _evaluated(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            raise JobError(f"The run {self.folder.name} was not evaluated; run ray_jobs.evaluate.")
        return path


def open_run(config: PipelineConfig, name: str | None) -> FinishedRun:
    """A finished run by name, or the newest one.

    Raises: JobError when there is no such run.
    """
    runs = Path(config.storage.runs_uri)
    if name is None:
        latest = runs / "LATEST"
        if not latest.exists():
            raise JobError(f"No run in {runs} is finished; run ray_jobs.train first.")
        name = latest.read_text().strip()
    folder = runs / name
    if not (folder / "run.json").exists():
        finished = sorted(path.parent.name for path in runs.glob("*/run.json"))
        raise JobError(f"There is no finished run {name!r}; finished: {', '.join(finished)}.")
    vocabulary = Vocabulary(
        Catalogue.read(folder / "catalogue.parquet"),
        ContextEncoder.read(folder / "context.json"),
        AttributeEncoder.read(folder / ATTRIBUTES),
    )
    return FinishedRun(folder, json.loads((folder / "run.json").read_text()), vocabulary)

"""Publishes an evaluated run as an artifact and makes it the version that serves.

    python -m ray_jobs.publish --config synthetic

A model that is not above every baseline is refused (`publish.must_beat_baselines`); the version
that served before then goes on serving.
"""

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deltalake import DeltaTable

from ray_jobs.build_sequences import read_stamp
from ray_jobs.code_version import code_version
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.job import Report, main
from ray_jobs.retraining.new_weeks import count_lake_rows
from ray_jobs.runs import EXPORT, FinishedRun, open_run
from ray_jobs.sequences_reader import collect_tokens, load_tokens, open_sequences
from recsys.artifact import ATTRIBUTES, publish, read_manifest
from recsys.encoders import OnnxEncoder, variant_file
from recsys.export import export_onnx, parity
from recsys.fallback import write_fallback
from recsys.registry import promote
from recsys.splits import whole_sequences
from recsys.tokens import TokenStore

_LEAST_OVERLAP = 0.999
_LIBRARIES = ("ray", "torch", "deltalake", "pyarrow", "numpy", "onnxruntime")


def run(config: PipelineConfig) -> Report:
    """Seals the artifact and promotes it. Raises: JobError when a gate is closed, ArtifactError."""
    path = publish_run(config)
    promote(path.parent, path.name)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Report(
        "publish",
        f"version {path.name} serves",
        {
            "version": path.name,
            "run": read_manifest(path)["run"],
            "bytes": size,
            "path": str(path),
        },
    )


def publish_run(config: PipelineConfig, facts: Mapping[str, Any] | None = None) -> Path:
    """Seals the artifact, which nobody sees before it is promoted; returns its folder.

    Args:
        facts: what else the manifest shall say.

    Raises: JobError when a gate is closed, ArtifactError.
    """
    finished = open_run(config, config.publish.run)
    evaluation = finished.evaluation()
    if config.publish.must_beat_baselines:
        _refuse_if_beaten(finished, evaluation)

    sequences = open_sequences(config, finished.facts["sequences_version"])
    dataset = load_tokens(sequences, config, finished.vocabulary)
    store = collect_tokens(dataset, len(finished.vocabulary.context.fields))
    version = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    registry = Path(config.storage.registry_uri)
    return publish(
        registry,
        version,
        lambda folder: _write_artifact(folder, finished, store, evaluation),
        {**_facts(config, finished, sequences), **(facts or {})},
    )


def _refuse_if_beaten(finished: FinishedRun, evaluation: dict[str, Any]) -> None:
    stronger = [name for name, row in evaluation["comparisons"].items() if row["difference"] <= 0]
    if stronger:
        raise JobError(
            f"The run {finished.folder.name} is not published: {', '.join(stronger)} reached at "
            "least its NDCG@10. Train longer or with another recipe, or set "
            "publish.must_beat_baselines to false."
        )


def _write_artifact(
    folder: Path, finished: FinishedRun, store: TokenStore, evaluation: dict[str, Any]
) -> None:
    for name in ("model.safetensors", "catalogue.parquet", "context.json", ATTRIBUTES):
        if (finished.folder / name).exists() or name != ATTRIBUTES:
            shutil.copy(finished.folder / name, folder / name)
    config = json.loads((finished.folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "recipe": finished.facts["recipe"]}, indent=1)
    )
    (folder / "metrics.json").write_text(json.dumps(evaluation, indent=1))
    # Nothing is held back from the fallback tables: they are not what was evaluated.
    everything = whole_sequences(store.offsets_U)
    vocabulary = finished.vocabulary
    write_fallback(
        folder / "fallback",
        store,
        everything,
        vocabulary.catalogue,
        vocabulary.context,
        covisitation=evaluation.get("baseline_settings", {}).get("covisitation", {}),
    )
    _export(finished, folder)


def _export(finished: FinishedRun, folder: Path) -> None:
    """The variants that `ray_jobs.export` wrote and found close to the model, or fp32 made now."""
    exported = finished.exported()
    if exported is not None and "fp32" in exported["variants"]:
        shutil.copytree(finished.folder / EXPORT, folder, dirs_exist_ok=True)
        return
    model = finished.load_model()
    path = folder / variant_file("fp32")
    export_onnx(model, path)
    found = parity(model, OnnxEncoder(path, model.config.max_len))
    if found.overlap < _LEAST_OVERLAP:
        raise JobError(
            f"The run {finished.folder.name} is not published: its export agrees with "
            f"only {found.overlap:.2%} of the model's top 10 (largest difference of scores "
            f"{found.max_difference:.2g})."
        )


def _facts(config: PipelineConfig, finished: FinishedRun, sequences: DeltaTable) -> dict[str, Any]:
    return {
        "name": config.name,
        "run": finished.folder.name,
        "seed": finished.facts["seed"],
        "trained_until_us": finished.facts.get("trained_until_us"),
        "started_from": finished.facts.get("started_from"),
        "tables": {
            "sequences": sequences.version(),
            "items": finished.facts.get("items_version"),
        },
        "sequences_from": read_stamp(sequences),
        "lake_rows": count_lake_rows(config),
        "code": {"train": finished.facts.get("code_sha256"), "publish": code_version()},
        "pipeline": finished.facts["config"],
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    main(run, job="publish")

"""What a published version is, and what it came from: versions of the tables, sequences, run and
artifact, with its recipe, its code and its metrics.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recsys.artifact import number_of, read_manifest, sha256_of
from recsys.errors import ArtifactError
from recsys.registry import Serving, check_version, list_versions, read_decisions

METRICS = ("NDCG@10", "HR@10")
_MODEL = "model"


@dataclass(frozen=True)
class Version:
    """One published version; what an older one did not record is None or missing."""

    version: str
    number: int
    """Place in the order of the registry; versions from before there was one have 0."""
    share: float
    """Of the visitors."""
    is_champion: bool
    published_at: str | None
    metrics: Mapping[str, Any]
    """Of `METRICS`, each with its mean and the ends of its 95 % interval."""
    num_test_users: int | None
    tables: Mapping[str, int | None]
    """Version of each table of the lake that it was made of."""
    rules: str | None
    """Digest of the rules by which sequences were made of events."""
    run: str | None
    recipe: str | None
    seed: int | None
    code: Mapping[str, str | None]
    """sha256 over the source files that trained and that published it."""
    trained_until_us: int | None
    started_from: Mapping[str, Any] | None
    """The version that training went on from."""
    retrain: Mapping[str, Any] | None
    """What `ray_jobs.retrain` found when it published it."""
    decisions: tuple[Mapping[str, Any], ...]
    """What became of it as a canary, oldest first."""
    weights_sha256: str | None

    def facts(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self)


def describe_version(root: Path, version: str, serving: Serving | None) -> Version:
    """Everything that is recorded of a version; `serving` of None: none serves.

    Raises: ArtifactError when it does not exist or its manifest is damaged.
    """
    check_version(root, version)
    path = root / version
    manifest = read_manifest(path)
    evaluation = _read_json(path / "metrics.json")
    rows = evaluation.get("rows", {}).get(_MODEL, {})
    return Version(
        version=version,
        number=number_of(path),
        share=0.0 if serving is None else serving.share_of(version),
        is_champion=serving is not None and version == serving.champion,
        published_at=manifest.get("published_at"),
        metrics={name: rows[name] for name in METRICS if name in rows},
        num_test_users=evaluation.get("num_users"),
        tables=_tables(manifest),
        rules=(manifest.get("sequences_from") or {}).get("rules"),
        run=manifest.get("run"),
        recipe=(_read_json(path / "config.json").get("recipe") or {}).get("name"),
        seed=manifest.get("seed"),
        code=manifest.get("code") or {},
        trained_until_us=manifest.get("trained_until_us"),
        started_from=manifest.get("started_from"),
        retrain=manifest.get("retrain"),
        decisions=tuple(read_decisions(root, version)),
        weights_sha256=manifest.get("files", {}).get("model.safetensors"),
    )


def find_version_of(root: Path, run: str) -> str | None:
    """The newest version that a run was published as; None where it was not."""
    versions = reversed(list_versions(root))
    return next((version for version in versions if _run_of(root / version) == run), None)


def digest_code(root: Path, packages: tuple[str, ...]) -> str:
    """sha256 over the path and the content of every source file and recipe of some packages, so
    that code has a version where there is no repository.
    """
    files = sorted(
        path
        for package in packages
        for pattern in ("*.py", "*.toml")
        for path in (root / package).rglob(pattern)
    )
    lines = [f"{path.relative_to(root)} {sha256_of(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _run_of(path: Path) -> str | None:
    """None also of a version that is damaged: it was not published just now."""
    try:
        run: str | None = read_manifest(path).get("run")
    except ArtifactError:
        return None
    return run


def _tables(manifest: Mapping[str, Any]) -> dict[str, int | None]:
    built = manifest.get("sequences_from") or {}
    tables = manifest.get("tables") or {}
    found = {name: built.get(f"{name}_version") for name in ("events", "users")}
    return {**found, **{name: tables.get(name) for name in ("items", "sequences")}}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); publish the run again.") from error
    return content

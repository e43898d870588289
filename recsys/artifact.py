"""The published artifact: a folder that serving reads, and nothing else that it reads.

    config.json             sizes of the model, and how it was trained
    model.safetensors       weights, and the codes of items where vectors are made of any
    catalogue.parquet       item_id, count, attributes; a row an item in index order
    context.json            context fields and their values
    attributes.json         attributes of items and their values, where vectors are made of any
    fallback/*.parquet      popular.parquet, segments.parquet, covisited.parquet
    metrics.json            the evaluation
    model.onnx              the encoder, where it was exported; model.<variant>.onnx in other
                            numbers, and export.json, how far they are from the model
    MANIFEST.json           sha256 of every other file, versions, seed, number of the version

It is written beside its place, verified and renamed: a reader sees all of it or none.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from recsys.attributes import NO_ATTRIBUTES, AttributeEncoder
from recsys.catalogue import Catalogue
from recsys.context import ContextEncoder
from recsys.errors import ArtifactError, CatalogueError
from recsys.item_table import ItemFeatures
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig

FORMAT = 1
MANIFEST = "MANIFEST.json"
ATTRIBUTES = "attributes.json"


@dataclass(frozen=True)
class Artifact:
    """A verified artifact; the weights stay on disk until `load_model`."""

    path: Path
    version: str
    config: dict[str, Any]
    """`{"model": ModelConfig, ...}` as JSON."""
    manifest: dict[str, Any]
    catalogue: Catalogue
    context: ContextEncoder
    attributes: AttributeEncoder = NO_ATTRIBUTES

    def load_model(self) -> NextItemModel:
        """The model in evaluation mode, on the CPU. Raises ArtifactError when the weights do not
        fit.
        """
        return load_model(self.path, self.catalogue, self.context, self.attributes)

    def metrics(self) -> dict[str, Any]:
        """The evaluation that this version was published with."""
        metrics: dict[str, Any] = json.loads((self.path / "metrics.json").read_text())
        return metrics


def save_model(
    folder: Path,
    model: NextItemModel,
    catalogue: Catalogue,
    context: ContextEncoder,
    attributes: AttributeEncoder = NO_ATTRIBUTES,
) -> None:
    """Writes config.json, model.safetensors, catalogue.parquet, context.json and, where items have
    attributes, attributes.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"model": model.config.model_dump(mode="json")}, indent=1)
    )
    save_weights(folder / "model.safetensors", model)
    catalogue.write(folder / "catalogue.parquet")
    context.write(folder / "context.json")
    if attributes.config.fields:
        attributes.write(folder / ATTRIBUTES)


def save_weights(path: Path, model: NextItemModel) -> None:
    """Writes the parameters, fp32, and codes of items, a byte each, as safetensors."""
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}, path
    )


def load_model(
    folder: Path,
    catalogue: Catalogue,
    context: ContextEncoder,
    attributes: AttributeEncoder = NO_ATTRIBUTES,
) -> NextItemModel:
    """The counterpart of `save_model`. Raises ArtifactError when files are missing or do not belong
    together.
    """
    try:
        config = ModelConfig.model_validate(
            json.loads((folder / "config.json").read_text())["model"]
        )
        features = ItemFeatures.build(catalogue, attributes)
        model = NextItemModel(config, catalogue.num_rows, context.sizes, features)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError, CatalogueError) as error:
        raise ArtifactError(f"The model in {folder} cannot be loaded: {error}") from error
    return model.eval()


def publish(root: Path, version: str, write: Callable[[Path], None], facts: dict[str, Any]) -> Path:
    """Makes `root/version` appear at once: `write` fills a temporary folder, which is sealed and
    renamed.

    Raises: ArtifactError when the version exists already.
    """
    target = root / version
    if target.exists():
        raise ArtifactError(
            f"Version {version} exists already in {root}; versions are never overwritten."
        )
    temporary = root / f".{version}-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        files = {
            str(path.relative_to(temporary)): sha256_of(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        number = 1 + max(
            (number_of(path.parent) for path in root.glob(f"[!.]*/{MANIFEST}")), default=0
        )
        manifest = {
            "format": FORMAT,
            "version": version,
            "number": number,
            "files": files,
            **facts,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, default=str))
        load_artifact(temporary)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def load_artifact(path: Path) -> Artifact:
    """Reads and verifies an artifact: every file of the manifest is there, unaltered.

    Raises: ArtifactError that names the first file at fault.
    """
    manifest = read_manifest(path)
    for name, expected in manifest["files"].items():
        if not (path / name).is_file():
            raise ArtifactError(
                f"{path} lacks {name}, which its manifest lists; publish the version again."
            )
        if sha256_of(path / name) != expected:
            raise ArtifactError(
                f"{path / name} was altered after it was published; publish the version again."
            )
    return Artifact(
        path=path,
        version=manifest["version"],
        config=json.loads((path / "config.json").read_text()),
        manifest=manifest,
        catalogue=Catalogue.read(path / "catalogue.parquet"),
        context=ContextEncoder.read(path / "context.json"),
        attributes=AttributeEncoder.read(path / ATTRIBUTES),
    )


def number_of(path: Path) -> int:
    """Place of a version among those of its registry, from 1; 0 where the manifest does not say.

    It counts what was there before: the clocks of the machines that publish do not matter.
    """
    try:
        return int(json.loads((path / MANIFEST).read_text())["number"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """What an artifact says of itself. Raises: ArtifactError when it is none, or of another
    format.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is not an artifact: it has no {MANIFEST}.") from None
    except ValueError as error:
        raise ArtifactError(f"{path / MANIFEST} is not JSON: {error}.") from None
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has format {manifest.get('format')}; this version reads format {FORMAT}."
        )
    return manifest

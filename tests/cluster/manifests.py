"""What tests of manifests share: the overlays as kustomize renders them, and ways through them."""

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"
KUBERNETES = CLUSTER / "kubernetes"
OVERLAYS = ("kind", "a100", "feast")

Manifest = dict[str, Any]


@cache
def render(overlay: str) -> tuple[Manifest, ...]:
    """Every object of an overlay; kubectl renders without a cluster."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", KUBERNETES / "overlays" / overlay],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def find(objects: tuple[Manifest, ...], kind: str, name: str) -> Manifest:
    """The one object of this kind and name."""
    (found,) = [
        manifest
        for manifest in objects
        if (manifest["kind"], manifest["metadata"]["name"]) == (kind, name)
    ]
    return found


def pod_templates(manifest: Manifest) -> Iterator[Manifest]:
    """Every pod template of an object, wherever its kind keeps it."""
    if isinstance(manifest, dict):
        if "spec" in manifest and "containers" in (manifest["spec"] or {}):
            yield manifest
        for value in manifest.values():
            yield from pod_templates(value)
    elif isinstance(manifest, list):
        for value in manifest:
            yield from pod_templates(value)


def all_templates(overlay: str) -> list[Manifest]:
    return [template for manifest in render(overlay) for template in pod_templates(manifest)]


def values_of(tree: Any, key: str) -> Iterator[Any]:
    """Every value below `key`, at any depth."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from values_of(value, key)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from values_of(value, key)


def environment_of(overlay: str) -> dict[str, str]:
    """Variables that Ray's containers get from their ConfigMap."""
    data: dict[str, str] = find(render(overlay), "ConfigMap", "nextitem-environment")["data"]
    return data

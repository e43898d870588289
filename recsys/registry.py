"""Which versions exist and which one serves: a folder of artifacts and one small file beside them.

<root>/<version>/...      artifacts, never changed once published
<root>/SERVING.json       {"version": ..., "previous": ...}
"""

import json
import os
import uuid
from pathlib import Path

from recsys.artifact import MANIFEST
from recsys.errors import ArtifactError

_SERVING = "SERVING.json"


def list_versions(root: Path) -> list[str]:
    """Published versions, oldest first (versions sort by time)."""
    return sorted(path.parent.name for path in root.glob(f"[!.]*/{MANIFEST}"))


def serving_version(root: Path) -> str:
    """The version that serves. Raises ArtifactError when none was promoted."""
    try:
        version: str = json.loads((root / _SERVING).read_text())["version"]
    except FileNotFoundError:
        raise ArtifactError(
            f"No version in {root} serves yet; run ray_jobs.publish first."
        ) from None
    return version


def promote(root: Path, version: str) -> None:
    """Makes a published version the one that serves; the file is replaced at once."""
    if version not in list_versions(root):
        raise ArtifactError(
            f"Version {version} is not in {root}; it holds: "
            f"{', '.join(list_versions(root)) or 'none'}."
        )
    previous = serving_version(root) if (root / _SERVING).exists() else None
    temporary = root / f"{_SERVING}.{uuid.uuid4().hex}"
    temporary.write_text(json.dumps({"version": version, "previous": previous}))
    os.replace(temporary, root / _SERVING)

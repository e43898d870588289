"""Checkpoints of a training: weights and state in one file, and a seal with its name and digest.

The seal is what makes a checkpoint: it is put in place last, at once, so that a reader finds this
one or the one before. What was cut off or altered is refused; only tensors and plain values are
read, never code.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recsys.errors import CheckpointError
from recsys.trainer import Trainer

_SEAL = "seal.json"


def save_checkpoint(folder: Path, trainer: Trainer) -> None:
    """Writes weights and state, and then the seal. All ranks hold the same; one of them writes.

    Raises: OSError, e.g. when the disk is full; what was there before is whole then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = folder / f"training-{trainer.epoch}-{trainer.step}.pt"
    temporary = folder / f".{content.name}"
    try:
        with temporary.open("wb") as file:
            torch.save({"weights": trainer.model.state_dict(), "state": trainer.state()}, file)
            file.flush()
            os.fsync(file.fileno())
        seal = {"file": content.name, "sha256": _digest(temporary)}
        os.replace(temporary, content)
    finally:
        temporary.unlink(missing_ok=True)
    temporary_seal = folder / f".{_SEAL}"
    temporary_seal.write_text(json.dumps(seal))
    os.replace(temporary_seal, folder / _SEAL)
    for older in folder.glob("training-*.pt"):
        if older != content:
            older.unlink()


def load_checkpoint(folder: Path, trainer: Trainer) -> None:
    """Continues where `save_checkpoint` was called. Raises: CheckpointError."""
    saved = _read(folder, trainer.device)
    try:
        trainer.restore(saved["state"], saved["weights"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint in {folder} is of another training: {error}"
        ) from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights alone, on the CPU. Raises: CheckpointError."""
    weights: dict[str, Tensor] = _read(folder, torch.device("cpu"))["weights"]
    return weights


def verify_checkpoint(folder: Path) -> Path:
    """The file that the seal names. Raises: CheckpointError when it is not what was sealed."""
    try:
        seal = json.loads((folder / _SEAL).read_text())
        content = folder / str(seal["file"])
        digest = _digest(content)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"The checkpoint in {folder} is not whole: {error}") from error
    if digest != seal["sha256"]:
        raise CheckpointError(
            f"{content} was cut off or altered after it was written; its digest is not the sealed "
            "one."
        )
    return content


def _read(folder: Path, device: torch.device) -> dict[str, Any]:
    content = verify_checkpoint(folder)
    saved: dict[str, Any] = torch.load(content, map_location=device, weights_only=True)
    return saved


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Checkpoints of a training: weights and state in one file, and a seal with its name and digest.

The seal is what makes a checkpoint: it is put in place last, at once, so that a reader finds this
one or the one before. What was cut off or altered is refused; only tensors and plain values are
read, never code.
"""

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recsys.errors import CheckpointError, TrainingError
from recsys.out_of_memory import is_out_of_memory
from recsys.trainer import Trainer

_SEAL = "seal.json"


class Saved(NamedTuple):
    """What a checkpoint holds."""

    weights: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, trainer: Trainer) -> None:
    """Writes weights and state, and then the seal. All ranks hold the same; one of them writes.

    Raises: OSError, e.g. when the disk is full, or TrainingError when a weight or a moment is not
        finite; what was there before is whole then.
    """
    reason = trainer.find_broken()
    if reason:
        raise TrainingError(reason)
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
    """Continues where `save_checkpoint` was called. Raises: CheckpointError; OSError."""
    restore(read_checkpoint(folder, trainer.device), trainer)


def read_checkpoint(folder: Path, device: torch.device) -> Saved:
    """What was saved, on a device.

    Raises: CheckpointError when it is not whole; OSError when it cannot be reached, which may pass.
    """
    content = verify_checkpoint(folder)
    try:
        saved = torch.load(content, map_location=device, weights_only=True)
        return Saved(saved["weights"], saved["state"])
    except (RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{content} is sealed and cannot be read: {error}") from error


def restore(saved: Saved, trainer: Trainer) -> None:
    """Continues from what was read. Raises: CheckpointError when it is of another training."""
    try:
        trainer.restore(saved.state, saved.weights)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"The checkpoint is of another training: {error}") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights alone, on the CPU. Raises as `read_checkpoint`."""
    return read_checkpoint(folder, torch.device("cpu")).weights


def verify_checkpoint(folder: Path) -> Path:
    """The file that the seal names.

    Raises: CheckpointError when it is not what was sealed; OSError when it cannot be reached, or
        the folder is not there.
    """
    os.stat(folder)
    try:
        seal = json.loads((folder / _SEAL).read_text())
        content = folder / str(seal["file"])
        digest = _digest(content)
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise CheckpointError(f"The checkpoint in {folder} is not whole: {error}") from error
    if digest != seal["sha256"]:
        raise CheckpointError(
            f"{content} was cut off or altered after it was written; its digest is not the sealed "
            "one."
        )
    return content


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

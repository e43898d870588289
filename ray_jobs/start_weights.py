"""The weights that all workers of a run begin with, in its folder."""

import os
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from recsys.artifact import sha256_of
from recsys.errors import TrainingError

_NAME = "start.safetensors"


@dataclass(frozen=True)
class StartWeights:
    """A file of weights and its SHA-256 when it was written."""

    path: Path
    sha256: str

    @classmethod
    def write(cls, weights: dict[str, Tensor], folder: Path) -> "StartWeights":
        """Leaves them in the folder; whoever looks finds the file whole or not at all."""
        temporary = folder / f".{_NAME}-{os.getpid()}"
        save_file(weights, temporary)
        sha256 = sha256_of(temporary)
        os.replace(temporary, folder / _NAME)
        return cls(folder / _NAME, sha256)

    def read(self) -> dict[str, Tensor]:
        """On the CPU. Raises: TrainingError when they are not those that were written; OSError when
        the file cannot be reached.
        """
        if sha256_of(self.path) != self.sha256:
            raise TrainingError(
                f"{self.path} was cut off or altered since the run began; start the run again."
            )
        return load_file(self.path)

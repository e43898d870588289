"""What can go wrong in the library.

RecsysError
├── CatalogueError   a catalogue is empty or does not belong to these weights
├── ArtifactError    a published artifact is incomplete, altered, or of another format
├── ScoreError       a scorer gave what is not a number
├── TrainingError    a run cannot start or go on (nothing to train on, loss not finite)
│   └── CheckpointError   a checkpoint is cut off, altered, or of another training
└── OutOfMemoryError  a step did not fit; what else runs there may have left too little
"""


class RecsysError(Exception):
    """Base of everything that this package raises on purpose."""


class CatalogueError(RecsysError):
    """The catalogue cannot serve."""


class ArtifactError(RecsysError):
    """The artifact cannot be trusted."""


class ScoreError(RecsysError, ValueError):
    """Scores that cannot be ranked."""


class TrainingError(RecsysError):
    """Training cannot start or go on."""


class CheckpointError(TrainingError):
    """The checkpoint cannot be trusted."""


class OutOfMemoryError(RecsysError):
    """A training step needed more memory than there was; the next try may go on."""

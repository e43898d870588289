"""What can go wrong in the lake.

    LakeError
    ├── SourceError      a raw file cannot be read at all, or lacks a mapped column
    ├── TableError       a table is missing, empty, or has another schema than asked for
    └── ConflictError    a commit lost to a concurrent writer more often than we retry

A bad *row* is no error: it goes to `quarantine`.
"""


class LakeError(Exception):
    """Base of everything that this package raises on purpose."""


class SourceError(LakeError):
    """A raw file cannot be read as configured."""


class TableError(LakeError):
    """A table of the lake is not in the state that the caller needs."""


class ConflictError(LakeError):
    """Concurrent writers kept winning; run the job again."""

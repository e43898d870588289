"""Jobs of which only one at a time may write to a folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from ray_jobs.errors import JobError


@contextmanager
def held(lock: Path, kind: str, name: str) -> Iterator[None]:
    """Holds a lock, which is free again when this process ends, however it ends.

    Args:
        kind: what the lock is for, e.g. "retraining"; `name` says which one this is.

    Raises: JobError that names the one that holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise JobError(
                f"Another {kind} is under way: {file.read().strip() or 'it just began'}. Wait "
                "until it ends, or stop it there."
            ) from None
        file.truncate(0)
        file.write(_describe_holder(name))
        file.flush()
        yield


def _describe_holder(name: str) -> str:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return f"{name}, process {os.getpid()} on {socket.gethostname()}, since {since}"

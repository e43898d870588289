"""How much memory is left to programs: on this machine, and in the container that holds them."""

import re
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Limit, use, and pages of files that give way, of cgroups v2 and v1."""


def free_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """What can still be taken before the kernel takes something back: the machine's free memory,
    or what the limit of this container leaves where that is less.
    """
    free_bytes = int(psutil.virtual_memory().available)
    left_bytes = _left_in_container(cgroup)
    return free_bytes if left_bytes is None else min(free_bytes, left_bytes)


def _left_in_container(cgroup: Path) -> int | None:
    """None without a limit; cgroups v1 give a number beyond all memory then."""
    for limit, use, stat, key in _FILES:
        try:
            limit_bytes = int((cgroup / limit).read_text())
            used_bytes = int((cgroup / use).read_text())
            files = re.search(rf"^{key} (\d+)$", (cgroup / stat).read_text(), re.M)
        except (FileNotFoundError, ValueError):  # no such cgroup, or a limit of "max"
            continue
        of_files = int(files[1]) if files else 0
        return max(0, limit_bytes - (used_bytes - of_files))
    return None

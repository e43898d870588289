"""What a run costs: the peak memory of a whole tree of processes, wall time, and the machine.

    with PeakMemory() as memory:
        generate.run(config)
    print(memory.peak_bytes, memory.by_kind_at_peak)

Linux alone: it reads `/proc`. Samples are taken by a small process of its own (this very file), so
that a busy interpreter cannot keep the sampler from its work.
"""

import json
import os
import platform
import re
import select
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

_PROC = Path("/proc")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_RAY_SYSTEM = re.compile(
    r"raylet/raylet|gcs_server|ray/dashboard|ray-dashboard|log_monitor|ray/autoscaler"
    r"|ray::(Dashboard|RuntimeEnv)Agent"
)
_RAY_WORKER = re.compile(r"^ray::|workers/default_worker\.py")


class PeakMemory:
    """Watches a process and all its descendants while the block runs, a Ray of their own included.

    Memory is PSS, so that a page that several processes map counts once (RSS where PSS may not be
    read), and `peak_bytes` is the largest sum of one moment. `by_kind_at_peak` divides it among
    "driver" (the process itself), "ray workers", "ray system", "shared memory" (the object store)
    and "others". `ray_session`, the name of a session folder, adds the processes of a Ray that was
    started by somebody else.

    Raises: ChildProcessError at the end of the block when the sampler failed.
    """

    def __init__(
        self, pid: int | None = None, *, ray_session: str = "", interval_s: float = 0.15
    ) -> None:
        self.pid = os.getpid() if pid is None else pid
        self.peak_bytes = 0
        self.by_kind_at_peak: dict[str, int] = {}
        self._command = [sys.executable, "-I", "-S", str(Path(__file__).resolve())]
        self._command += [str(self.pid), ray_session, str(interval_s)]

    def __enter__(self) -> Self:
        self._sampler = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._sampler.stdout is not None
        self._sampler.stdout.readline()  # the first sample is taken
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        found, _ = self._sampler.communicate()
        if self._sampler.returncode:
            raise ChildProcessError(
                f"The memory of process {self.pid} could not be sampled (status "
                f"{self._sampler.returncode}); see the traceback on stderr, and run on Linux."
            )
        self.by_kind_at_peak = json.loads(found)
        self.peak_bytes = sum(self.by_kind_at_peak.values())


class Measured(NamedTuple):
    """What a command took, and what it printed."""

    seconds: float
    peak_bytes: int
    stdout: str


def measured(command: list[str]) -> Measured:
    """Runs a command and measures it with all its descendants.

    The first 50 ms or so go unseen. Raises: CalledProcessError unless it exits with 0.
    """
    started = time.perf_counter()
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
        PeakMemory(process.pid) as memory,
    ):
        stdout, _ = process.communicate()
        seconds = time.perf_counter() - started
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stdout)
    return Measured(seconds, memory.peak_bytes, stdout)


def machine() -> str:
    """The machine, the Python and the day, in a line."""
    cpu = re.search(r"model name\s*: (.+)", _read(_PROC / "cpuinfo"))
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES
    return (
        f"{len(os.sched_getaffinity(0))} cores of {cpu[1] if cpu else platform.machine()}, "
        f"{memory_bytes / 2**30:.0f} GiB, Python {platform.python_version()}, "
        f"{datetime.now(UTC):%Y-%m-%d}"
    )


class _Sampler:
    """Finds the processes that belong to the one that is watched and adds up what they hold."""

    def __init__(self, root: int, ray_session: str) -> None:
        self.root = root
        self.ray_session = ray_session
        # By pid and start: a process that loses its parent still counts, a reused pid does not.
        self.known: set[tuple[int, str]] = set()
        self.readings: dict[int, tuple[str, tuple[int, int]]] = {}

    def sample(self) -> Counter[str]:
        """Bytes by kind at this moment."""
        bytes_by_kind: Counter[str] = Counter()
        store_bytes = 0
        for pid in self._members():
            command = _read(_PROC / str(pid) / "cmdline").replace("\0", " ")
            kind = self._kind(pid, command)
            is_raylet = "raylet/raylet" in command
            is_quiet = kind == "ray system" and not is_raylet  # the raylet maps the object store
            private_bytes, shared_bytes = self._memory_of(pid, is_quiet=is_quiet)
            bytes_by_kind[kind] += private_bytes
            bytes_by_kind["shared memory"] += shared_bytes
            if is_raylet:
                store_bytes += _object_store_of(pid)
        # Pages of the store that nobody maps any more are in no process's PSS, yet they are held.
        bytes_by_kind["shared memory"] = max(bytes_by_kind["shared memory"], store_bytes)
        return bytes_by_kind

    def _members(self) -> list[int]:
        parents, starts = _process_table()
        children: dict[int, list[int]] = {}
        for pid, parent in parents.items():
            children.setdefault(parent, []).append(pid)

        found = {pid for pid, start in self.known if starts.get(pid) == start} | {self.root}
        if self.ray_session:
            found |= {pid for pid in parents if self.ray_session in _read(_PROC / f"{pid}/cmdline")}
        waiting = list(found)
        while waiting:
            new = [pid for pid in children.get(waiting.pop(), []) if pid not in found]
            found.update(new)
            waiting += new
        found.discard(os.getpid())
        self.known = {(pid, starts[pid]) for pid in found if pid in starts}
        return [pid for pid, _ in self.known]

    def _kind(self, pid: int, command: str) -> str:
        if pid == self.root:
            return "driver"
        if _RAY_SYSTEM.search(command):
            return "ray system"
        return "ray workers" if _RAY_WORKER.search(command) else "others"

    def _memory_of(self, pid: int, *, is_quiet: bool) -> tuple[int, int]:
        """Bytes of a process, read again only where its pages changed if it is a quiet one.

        Reading walks page tables: the fifteen idle daemons of a Ray would cost a tenth of a core.
        """
        pages = _read(_PROC / f"{pid}/statm")
        before = self.readings.get(pid)
        if is_quiet and before is not None and before[0] == pages:
            return before[1]
        self.readings[pid] = pages, _memory_of(pid)
        return self.readings[pid][1]


def _process_table() -> tuple[dict[int, int], dict[int, str]]:
    """Parent and start time of each process of this machine."""
    parents, starts = {}, {}
    for name in os.listdir(_PROC):
        if not name.isdigit():
            continue
        # The name in parentheses may hold anything, spaces and parentheses included.
        fields = _read(_PROC / name / "stat").rpartition(")")[2].split()
        if fields:
            parents[int(name)], starts[int(name)] = int(fields[1]), fields[19]
    return parents, starts


def _memory_of(pid: int) -> tuple[int, int]:
    """Bytes of a process: its share of private memory and files, and of shared memory."""
    rollup = dict(re.findall(r"^(\w+): +(\d+) kB$", _read(_PROC / f"{pid}/smaps_rollup"), re.M))
    if "Pss" in rollup:
        shared = int(rollup.get("Pss_Shmem", 0))
        return (int(rollup["Pss"]) - shared) * 1024, shared * 1024
    pages = _read(_PROC / f"{pid}/statm").split()
    return (int(pages[1]) * _PAGE_BYTES if pages else 0), 0


def _object_store_of(raylet: int) -> int:
    """Bytes that a raylet's object store holds in memory, mapped or not."""
    stores = {}
    try:
        for entry in os.scandir(_PROC / f"{raylet}/fd"):
            if os.readlink(entry.path).startswith("/dev/shm/plasma"):
                found = os.stat(entry.path)
                stores[found.st_ino] = found.st_blocks * 512
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return 0  # it has ended meanwhile, or is not ours: what is mapped is counted anyway
    return sum(stores.values())


def _read(path: Path) -> str:
    """A file of `/proc`, empty when its process has ended or may not be looked at."""
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return ""


def _watch(root: int, ray_session: str, interval_s: float) -> None:
    """Samples until standard input ends, and once more; prints the largest sample as JSON."""
    sampler = _Sampler(root, ray_session)
    largest = sampler.sample()
    print("ready", flush=True)
    is_over, pause_s = False, interval_s
    while not is_over:
        is_over = bool(select.select([sys.stdin], [], [], pause_s)[0])
        started = time.perf_counter()
        largest = max(largest, sampler.sample(), key=Counter.total)
        # Many pages take long to count: at most a twentieth of a core goes into it.
        pause_s = max(interval_s, 19 * (time.perf_counter() - started))
    print(json.dumps(largest))


if __name__ == "__main__":
    _watch(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))

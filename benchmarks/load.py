"""Load on an endpoint from processes of its own, and an account of every answer.

    result = run_load(Plan(url, bodies, seconds=10, rate=100))      # open loop
    result = run_load(Plan(url, bodies, seconds=10, connections=8)) # closed loop
    print(result.percentile_ms(99), result.non_2xx)

In an open loop requests are due by a schedule, whatever becomes of those before them, and latency
counts from the moment a request was due: a server that stalls is not spared the requests that it
kept from being sent. In a closed loop each connection sends its next request when it has its
answer. Either way every connection stays open, and time and requests in flight are bounded.
"""

import asyncio
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from heapq import nlargest
from pathlib import Path
from typing import Any, Self

import aiohttp
import numpy as np

_ROOT = Path(__file__).parents[1]
_NUM_TOLD = 20


@dataclass(frozen=True)
class Plan:
    """What is sent where, how often and for how long."""

    url: str
    bodies: Sequence[dict[str, Any]]
    """Sent as JSON by POST, one after another, from the start again at their end."""
    seconds: float
    rate: float | None = None
    """Requests a second by a schedule; None for a closed loop."""
    connections: int = 8
    """Requests in flight: as many always (closed loop), or at most (open loop)."""
    processes: int = 1
    """Schedule and connections are divided among them."""
    requests: int | None = None
    """Of each process in a closed loop, where it is to end before its time."""
    timeout_s: float = 10.0
    """An answer that has not come by then is an error of kind `TimeoutError`."""
    top_k: int = 10
    """Entries of a full list."""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadResult:
    """What became of every request."""

    seconds: float
    """From the first request to the last answer."""
    latencies_ms: tuple[float, ...] = ()
    """Of every answer, whatever its status; in an open loop from the moment it was due."""
    statuses: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    """Rungs that lists came from; "none" for an answer that is no list."""
    errors: Counter[str] = field(default_factory=Counter)
    """Requests without any answer, by the kind of the client's error."""
    degraded: int = 0
    short: int = 0
    """2xx answers with fewer entries than asked for."""
    slowest: tuple[str, ...] = ()
    """The slowest answers, in words, the slowest first."""
    failures: tuple[str, ...] = ()
    """The first answers that were not 2xx and the first errors, in words."""
    client_cpu_s: float = 0.0
    """CPU time that sending and counting took."""

    @property
    def answered(self) -> int:
        return self.statuses.total()

    @property
    def sent(self) -> int:
        return self.answered + self.errors.total()

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.answered / self.seconds

    @property
    def non_2xx(self) -> int:
        """Requests with another answer, or with none."""
        good = sum(count for status, count in self.statuses.items() if status.startswith("2"))
        return self.sent - good

    @property
    def degraded_share(self) -> float:
        return self.degraded / max(1, self.answered)

    def percentile_ms(self, percent: float) -> float:
        """Latency that so many percent of the answers kept; NaN where there was none."""
        if not self.latencies_ms:
            return float("nan")
        return float(np.percentile(self.latencies_ms, percent))

    def figures(self) -> dict[str, Any]:
        """The account without single latencies, as JSON takes it."""
        return {
            "rate": round(self.rate, 1),
            "seconds": round(self.seconds, 1),
            **{f"p{n}_ms": round(self.percentile_ms(n), 2) for n in (50, 95, 99)},
            "max_ms": round(self.percentile_ms(100), 2),
            "non_2xx": self.non_2xx,
            "degraded_share": round(self.degraded_share, 5),
            "short": self.short,
            "statuses": dict(self.statuses),
            "errors": dict(self.errors),
            "sources": dict(self.sources),
            "client_cores": round(self.client_cpu_s / self.seconds, 2),
        }

    def __add__(self, other: Self) -> "LoadResult":
        """Both at the same time."""
        return LoadResult(
            max(self.seconds, other.seconds),
            self.latencies_ms + other.latencies_ms,
            self.statuses + other.statuses,
            self.sources + other.sources,
            self.errors + other.errors,
            self.degraded + other.degraded,
            self.short + other.short,
            self.slowest + other.slowest,
            (self.failures + other.failures)[:_NUM_TOLD],
            self.client_cpu_s + other.client_cpu_s,
        )


class RunningLoad:
    """Load under way, so that something can be broken meanwhile; ends with its block.

    with RunningLoad(plan) as load:
        kill(replica)
        result = load.wait()
    """

    def __init__(self, plan: Plan) -> None:
        self._parts = [_part_of(plan, number) for number in range(plan.processes)]
        self._patience_s = plan.seconds + plan.timeout_s + 60

    def __enter__(self) -> Self:
        """Returns when the first requests are on their way."""
        command = [sys.executable, "-m", "benchmarks.load"]
        self._processes = [
            subprocess.Popen(
                command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in self._parts
        ]
        for process, part in zip(self._processes, self._parts, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(part) + "\n")
            process.stdin.flush()
        for process in self._processes:
            assert process.stdout is not None
            process.stdout.readline()
        return self

    def wait(self) -> LoadResult:
        """The account of all processes. Raises: ChildProcessError when one of them failed."""
        total = LoadResult(0.0)
        for process in self._processes:
            found, _ = process.communicate(timeout=self._patience_s)
            if process.returncode:
                raise ChildProcessError(
                    f"A process that makes load ended with status {process.returncode}; "
                    "see its traceback on stderr."
                )
            total += _read_result(json.loads(found))
        return total

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


def run_load(plan: Plan) -> LoadResult:
    """Carries a plan out from start to end."""
    with RunningLoad(plan) as load:
        return load.wait()


async def drive(plan: Plan, started: Callable[[], None] = lambda: None) -> LoadResult:
    """Carries a plan out in this process; `started` is called before the first request."""
    loop = asyncio.get_running_loop()
    bodies = [json.dumps(body).encode() for body in plan.bodies]
    account = _Account(plan.top_k)
    async with _client(plan) as client:

        async def send(number: int, due: float) -> None:
            try:
                async with client.post(plan.url, data=bodies[number % len(bodies)]) as answer:
                    text = await answer.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                account.count_error(error, loop.time() - begun)
            else:
                account.count(answer.status, text, loop.time() - due, loop.time() - begun)

        cpu_before = time.process_time()
        begun = loop.time()
        started()
        if plan.rate is None:
            await _closed_loop(plan, send)
        else:
            await _open_loop(plan, send)
        seconds = loop.time() - begun
        return account.result(seconds, time.process_time() - cpu_before)


_Send = Callable[[int, float], Coroutine[Any, Any, None]]


async def _closed_loop(plan: Plan, send: _Send) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + plan.seconds
    last = float("inf") if plan.requests is None else plan.requests

    async def keep_sending(number: int) -> None:
        while loop.time() < end and number < last:
            await send(number, loop.time())
            number += plan.connections

    await asyncio.gather(*map(keep_sending, range(plan.connections)))


async def _open_loop(plan: Plan, send: _Send) -> None:
    assert plan.rate is not None
    loop = asyncio.get_running_loop()
    begun = loop.time()
    under_way = set()
    for number in range(round(plan.rate * plan.seconds)):
        due = begun + number / plan.rate
        await _sleep_until(due)
        # What finds no free connection waits for one, and its wait counts.
        task = asyncio.create_task(send(number, due))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)


async def _sleep_until(due: float) -> None:
    # Timers of an event loop are whole milliseconds and late; the last one is spent awake.
    loop = asyncio.get_running_loop()
    while (left := due - loop.time()) > 0:
        await asyncio.sleep(max(0.0, left - 0.0015))


@asynccontextmanager
async def _client(plan: Plan) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=plan.connections),
        timeout=aiohttp.ClientTimeout(plan.timeout_s),
        headers={"Content-Type": "application/json", **plan.headers},
        auto_decompress=False,
    ) as client:
        yield client


class _Account:
    """Counts answers as they come."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._latencies_ms: list[float] = []
        self._statuses: Counter[str] = Counter()
        self._sources: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._failures: list[str] = []
        self._slowest: list[tuple[float, str]] = []
        self._degraded = 0
        self._short = 0

    def count(self, status: int, body: bytes, took_s: float, at_s: float) -> None:
        self._latencies_ms.append(round(took_s * 1000, 3))
        self._statuses[str(status)] += 1
        self._slowest.append((took_s, f"{at_s:.2f} s: {status} after {took_s * 1000:.0f} ms"))
        if len(self._slowest) > 2 * _NUM_TOLD:
            self._slowest = nlargest(_NUM_TOLD, self._slowest)
        if not 200 <= status < 300:
            self._tell(f"{at_s:.2f} s: {status} {body[:200]!r}")
            return
        answer = _object_of(body)
        self._sources[answer.get("source", "none")] += 1
        self._degraded += answer.get("degraded") is True
        self._short += len(answer.get("recommendations", ())) < self._top_k

    def count_error(self, error: Exception, at_s: float) -> None:
        self._errors[type(error).__name__] += 1
        self._tell(f"{at_s:.2f} s: {type(error).__name__} {error}")

    def result(self, seconds: float, cpu_s: float) -> LoadResult:
        return LoadResult(
            seconds,
            tuple(self._latencies_ms),
            self._statuses,
            self._sources,
            self._errors,
            self._degraded,
            self._short,
            tuple(words for _, words in nlargest(_NUM_TOLD, self._slowest)),
            tuple(self._failures),
            cpu_s,
        )

    def _tell(self, failure: str) -> None:
        if len(self._failures) < _NUM_TOLD:
            self._failures.append(failure)


def _object_of(body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _part_of(plan: Plan, number: int) -> dict[str, Any]:
    """What one of the processes does: its share of the schedule, with every n-th body."""
    share = plan.connections // plan.processes + (number < plan.connections % plan.processes)
    return asdict(
        replace(
            plan,
            bodies=[*plan.bodies[number :: plan.processes]] or list(plan.bodies),
            rate=plan.rate and plan.rate / plan.processes,
            connections=max(1, share),
            processes=1,
        )
    )


def _read_result(found: dict[str, Any]) -> LoadResult:
    counted = {name: Counter(found[name]) for name in ("statuses", "sources", "errors")}
    lists = {name: tuple(found[name]) for name in ("latencies_ms", "slowest", "failures")}
    return LoadResult(**{**found, **counted, **lists})


def main() -> None:
    """One process of a load: a plan on standard input, the account on standard output."""
    plan = Plan(**json.loads(sys.stdin.readline()))
    # Each connection is a file.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 65_536)), hard))
    result = asyncio.run(drive(plan, lambda: print("started", flush=True)))
    print(json.dumps(vars(result)))


if __name__ == "__main__":
    main()

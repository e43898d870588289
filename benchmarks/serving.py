"""The endpoint under load: latency at a fixed rate, the most it answers, by which way requests come
best, and what the whole stack costs over the bare model.

    python -m benchmarks.serving                       (ML-1M's size, 100 requests a second)
    python -m benchmarks.serving --items 2_000_000     (RecJPQ and full tables, 30 a second)

Nothing is trained: a version with random weights costs the same. Load comes from processes of its
own (`benchmarks.load`), the cache is off, every history is another one, and no request asks for
more time than the deployment's deadline, so that an answer of a lower rung counts as degraded.
Server and load share the cores of one machine.

Writes `benchmarks/results/serving.md` and `.json`, for 2 M items `serving-2000000.md`; the last
line printed is one JSON object: the open loop of the first table, with the ranker inside the
ingress where that was measured.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.load import LoadResult, Plan, run_load
from benchmarks.measure import machine
from benchmarks.serving_app import WAYS, Endpoint, Way
from benchmarks.serving_artifact import Shape, draw_bodies, publish_random

RESULTS = Path(__file__).parent / "results"
LARGE = 100_000
"""Items from which on a catalogue is served from both kinds of tables, by the default way alone."""
_WARM_UP = 200
_SUMMARY = (
    *("rate", "seconds", "p50_ms", "p95_ms", "p99_ms", "max_ms"),
    *("non_2xx", "degraded_share"),
)
_QUICK = {"dim": 32, "layers": 1, "heads": 2, "max_len": 16}


@dataclass(frozen=True)
class Study:
    """What is measured on one model."""

    shape: Shape
    ways: tuple[Way, ...]
    rate: float
    seconds: float
    """Of the open loop by the default way and of the bare model; the others take a third of it."""
    top_k: int
    connections: tuple[int, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One load on one way."""

    way: Way
    loop: str
    """`open, 100/s` or, with the connections, `closed, 8`."""
    result: LoadResult
    seconds_to_ready: float

    def figures(self) -> dict[str, Any]:
        return {
            "way": self.way,
            "loop": self.loop,
            "seconds_to_ready": round(self.seconds_to_ready, 1),
            **self.result.figures(),
        }


@dataclass(frozen=True)
class Findings:
    """All loads on one model."""

    study: Study
    rows: tuple[Row, ...]
    ranker_restart_s: float
    """From the ranker's death to the model's next list."""

    def at_rate(self, way: Way) -> LoadResult:
        """The open loop by a way."""
        return next(
            row.result for row in self.rows if row.way == way and row.loop.startswith("open")
        )

    def summary(self) -> dict[str, Any]:
        """What is held against the goals."""
        fastest: Way = "inside" if "inside" in self.study.ways else "haproxy"
        found, bare_ms = self.at_rate(fastest), self.at_rate("bare").percentile_ms(50)
        figures = found.figures()
        # A list of a lower rung comes without the model, and is no match for one of the bare model.
        is_comparable = found.degraded_share <= 0.01
        return {
            **{name: figures[name] for name in _SUMMARY},
            "bare_p50_ms": round(bare_ms, 2),
            "overhead": round(found.percentile_ms(50) / bare_ms, 2) if is_comparable else None,
        }


def main() -> None:
    """Parses; measures and records."""
    arguments = parse_arguments()
    findings = [measure(study) for study in plan_studies(arguments)]
    if not arguments.quick:
        write_record(findings)
    print(json.dumps(findings[0].summary()))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=Shape.items)
    parser.add_argument("--rate", type=float, help="requests a second of the open loop")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the open loop")
    parser.add_argument("--deadline-ms", type=int, default=70)
    parser.add_argument("--ranker-cpus", type=float, help="also its threads")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--quick", action="store_true", help="a small model, briefly; no record")
    return parser.parse_args(argv)


def plan_studies(arguments: argparse.Namespace) -> list[Study]:
    """One study, or one for each kind of table of a large catalogue."""
    is_large = arguments.items >= LARGE
    brief: tuple[Way, ...] = ("inside", "haproxy", "bare")
    ways = brief if is_large or arguments.quick else tuple(arguments.ways)
    sizes = _QUICK if arguments.quick else {}
    return [
        Study(
            Shape(arguments.items, codes=codes, **sizes),
            ways,
            rate=arguments.rate or (30.0 if is_large else 100.0),
            seconds=2.0 if arguments.quick else arguments.seconds,
            top_k=100 if is_large else 10,
            connections=(4,) if is_large or arguments.quick else (1, 8, 32),
            settings={
                "backend": "onnx",
                "cache_size": 0,
                "deadline_ms": arguments.deadline_ms,
                "ranker_cpus": arguments.ranker_cpus or (2.0 if is_large else 1.0),
            },
        )
        for codes in ((8, 0) if is_large else (0,))
    ]


def measure(study: Study) -> Findings:
    """Serves a model by every way in turn, with load on it."""
    rows: list[Row] = []
    restart_s = float("nan")
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        registry = Path(folder)
        publish_random(registry, study.shape)
        bodies = draw_bodies(study.shape, 5000, study.top_k)
        for way in study.ways:
            with Endpoint(way, registry, **study.settings) as endpoint:
                run_load(Plan(endpoint.url, bodies, 30, connections=1, requests=_WARM_UP))
                for loop, plan in _plans(study, way, endpoint.url, bodies):
                    row = Row(way, loop, run_load(plan), endpoint.seconds_to_ready)
                    rows.append(row)
                    print(row.figures(), flush=True)
                if way == "haproxy":
                    restart_s = endpoint.restart_ranker()
    return Findings(study, tuple(rows), restart_s)


def _plans(
    study: Study, way: Way, url: str, bodies: list[dict[str, Any]]
) -> Iterator[tuple[str, Plan]]:
    is_main = way in ("inside", "haproxy", "bare")
    seconds = study.seconds if is_main else study.seconds / 3
    at_rate = Plan(url, bodies, seconds, study.rate, connections=256, top_k=study.top_k)
    yield f"open, {study.rate:g}/s", at_rate
    for connections in study.connections:
        brief = study.seconds / 3
        yield (
            f"closed, {connections}",
            Plan(url, bodies, brief, connections=connections, top_k=study.top_k),
        )


def write_record(findings: list[Findings]) -> None:
    """Writes the tables and all figures."""
    items = findings[0].study.shape.items
    name = f"serving-{items}" if items >= LARGE else "serving"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(render(findings))
    record = {
        "machine": machine(),
        "studies": [
            {
                "shape": vars(found.study.shape),
                "settings": found.study.settings,
                "ranker_restart_s": round(found.ranker_restart_s, 1),
                "summary": found.summary(),
                "rows": [row.figures() for row in found.rows],
            }
            for found in findings
        ],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def render(findings: list[Findings]) -> str:
    """The record as Markdown."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("ray", "onnxruntime"))
    command = " ".join(["python -m benchmarks.serving", *sys.argv[1:]])
    lines = [
        "# Serving under load",
        "",
        f"`{command}` on {machine()}; {versions}.",
        "Random weights, cache off, load from a process of its own on the same cores. `open`",
        "counts latency from the moment a request was due; `ready` is from the deployment to the",
        "first request taken. `inside` is HAProxy and an ingress that ranks by itself; the other",
        "ways have a ranker of its own deployment.",
    ]
    for found in findings:
        lines += ["", f"## {found.study.shape}, top {found.study.top_k}", "", *_table(found)]
    return "\n".join(lines) + "\n"


def _table(found: Findings) -> list[str]:
    summary = found.summary()
    verdict = (
        f"At {found.study.rate:g}/s the stack (the first way) takes {summary['overhead']} times "
        f"the {summary['bare_p50_ms']} ms of the bare model at the median."
        if summary["overhead"] is not None
        else f"At {found.study.rate:g}/s too many lists came without the model to be compared."
    )
    return [
        "| way | loop | answers/s | p50, ms | p95 | p99 | max | not 2xx | degraded | ready, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(_table_row, found.rows),
        "",
        f"{verdict} A ranker that is killed is back after {found.ranker_restart_s:.1f} s; until "
        "then lists are degraded.",
    ]


def _table_row(row: Row) -> str:
    result = row.result
    latencies = " | ".join(f"{result.percentile_ms(n):.1f}" for n in (50, 95, 99, 100))
    return (
        f"| {row.way} | {row.loop} | {result.rate:.0f} | {latencies} | {result.non_2xx} "
        f"| {result.degraded_share:.2%} | {row.seconds_to_ready:.1f} |"
    )


if __name__ == "__main__":
    main()

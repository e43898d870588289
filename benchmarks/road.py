"""The demo's tables: walks the whole road on each data set and records what came out.

    python -m benchmarks.road                      (synthetic alone)
    python -m benchmarks.road --data ml-1m globo

Writes `benchmarks/results/road-<data>.md` with the table, the wall time of each stage, the seed,
the date and the machine. The last line printed is one JSON object with NDCG@10 by data set.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from ray_jobs.job import builtin_configs, load_config
from ray_jobs.runs import open_run

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Parses, walks, records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["synthetic"], choices=builtin_configs())
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    summary = {data: walk(data, arguments.port) for data in arguments.data}
    print(json.dumps(summary))


def walk(data: str, port: int) -> dict[str, float | int]:
    """One demo from start to end; its record, and the figures of the summary."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "ray_jobs.demo", "--data", data, "--exit"]
    command += ["--port", str(port)]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        for line in demo.stdout or ():
            sys.stdout.write(line)
            lines.append(line)
    seconds = time.perf_counter() - started
    record = _record(data, "".join(lines), seconds, demo.returncode)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"road-{data}.md").write_text(record)

    evaluation = open_run(load_config(data), None).evaluation()
    return {
        "ndcg10": evaluation["rows"]["model"]["NDCG@10"]["mean"],
        "seconds": round(seconds),
        "exit_status": demo.returncode,
    }


def _record(data: str, output: str, seconds: float, status: int) -> str:
    config = load_config(data)
    run = open_run(config, None)
    stages = re.findall(r"^\[\d+/\d+\] (.+)$", output, re.MULTILINE)
    times = re.findall(r"^  \(([\d.]+) s\)$", output, re.MULTILINE)
    checks = re.findall(r"^  (?:ok |NOT)  .+$", output, re.MULTILINE)
    shortfalls = re.findall(r"^FELL SHORT: .+$", output, re.MULTILINE)
    lines = [
        f"# The road on {data}",
        "",
        f"`make demo DATA={data} ARGS=--exit` on {datetime.now(UTC):%Y-%m-%d}, {_machine()}, "
        f"seed {config.seed}: {seconds:.0f} s, exit status {status}.",
        f"Recipe {run.facts['recipe']['name']}, {len(run.facts['history'])} epochs, best at "
        f"{run.facts['best']['epoch']}. Test pairs (sha256) {run.evaluation()['targets_sha256']}.",
        "",
        "```",
        run.evaluation()["table"],
        "```",
        "",
        *[f"- {stage}: {took} s" for stage, took in zip(stages, times, strict=False)],
        "",
        "```",
        *checks,
        *shortfalls,
        "```",
    ]
    return "\n".join(lines) + "\n"


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    name = names[0] if names else platform.processor()
    return f"{os.cpu_count()} cores of {name}, Python {platform.python_version()}"


if __name__ == "__main__":
    main()

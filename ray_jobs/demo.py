"""The whole road in one command: raw events to an HTTP recommendation, on a Ray of its own.

    python -m ray_jobs.demo --data synthetic          (or: make demo)

Leaves the server up until Ctrl-C; with --exit it stops at the end. Exits non-zero when a stage fell
short: a failed job, a model below a baseline, or an answer that was late, wrong or empty.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ray
import ray.data

from ray_jobs import build_sequences, evaluate, generate, ingest, materialize, publish, serve, train
from ray_jobs.config import PipelineConfig
from ray_jobs.datasets import ensure_dataset
from ray_jobs.errors import ConfigError, JobError
from ray_jobs.free_memory import free_memory_bytes
from ray_jobs.http_checks import Check, check_endpoint, example_user
from ray_jobs.http_path import plan_http_path
from ray_jobs.job import Report, builtin_configs, load_config
from ray_jobs.reasons import OURS, keep_reasons, sentence_of
from ray_jobs.runs import open_run
from ray_jobs.sections.serving import ServeConfig

_OBJECT_STORE_BYTES = 1_000_000_000
_NEEDED_BYTES = 4_000_000_000
_CHATTY = (
    "ray.data",
    "ray.data._internal.execution.streaming_executor",
    "ray.data._internal.progress",
    "torch.onnx",
    "onnxscript",
    "onnx_ir",
)
"""Loggers that say nothing about our stages below an error."""
_Stage = tuple[str, Callable[[PipelineConfig], Report]]

ROAD: tuple[_Stage, ...] = (
    ("events into the Delta lake", ingest.run),
    ("events into sequences, with Ray Data", build_sequences.run),
    ("a model, with Ray Train", train.run),
    ("the model against the baselines", evaluate.run),
    ("an artifact that serving can trust", publish.run),
    ("every user's recent events for serving", materialize.run),
    ("the endpoint, with Ray Serve", serve.run),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, runs, serves and exits."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    quieten_loggers()
    try:
        # A model that loses to a baseline is shown and counted as a shortfall, not hidden.
        fixed = [f"serve.port={arguments.port}", "publish.must_beat_baselines=false"]
        config = load_config(arguments.data, [*fixed, *arguments.set])
        serve.refuse_taken_port(config)
        ensure_dataset(arguments.data)
        with private_folder() as folder:
            start_ray(config.serve, Path(folder))
            shortfalls = run_demo(config, serve_only=arguments.serve_only)
            wait_or_exit(arguments.exit, shortfalls)
    except OURS as error:
        print(f"\ndemo failed: {sentence_of(error)}", file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    finally:
        ray.shutdown()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of the demo."""
    parser = argparse.ArgumentParser(prog="make demo", description="Raw events to HTTP answers.")
    parser.add_argument("--data", default="synthetic", choices=builtin_configs())
    parser.add_argument("--port", type=int, default=8000, help="of the endpoint (default 8000)")
    parser.add_argument("--exit", action="store_true", help="stop at the end, with a verdict")
    parser.add_argument("--serve-only", action="store_true", help="serve what was published before")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args(argv)


def private_folder() -> tempfile.TemporaryDirectory[str]:
    """For sockets of HAProxy, whose paths must be short; nobody else may look into it."""
    # Processes of Ray may still write while they end.
    return tempfile.TemporaryDirectory(prefix="nextitem-", dir="/tmp", ignore_cleanup_errors=True)


def start_ray(config: ServeConfig, folder: Path) -> None:
    """A Ray of our own on this machine, with the way in for requests that `config` asks for.

    Raises: JobError when memory does not allow it.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    available = free_memory_bytes()
    if available < _NEEDED_BYTES:
        raise JobError(
            f"The demo needs {_NEEDED_BYTES / 1e9:.0f} GB of free memory, "
            f"{_OBJECT_STORE_BYTES / 1e9:.0f} of them for Ray's object store, and this machine has "
            f"{available / 1e9:.1f}; close other programs."
        )
    path = plan_http_path(config, folder)
    if path.shortfall:
        print(path.shortfall, flush=True)
    os.environ.update(path.environment)
    try:
        context = ray.init(
            num_cpus=max(2, os.cpu_count() or 2),
            include_dashboard=True,
            object_store_memory=_OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            runtime_env={"worker_process_setup_hook": quieten_loggers},
        )
    except ValueError as error:
        raise JobError(f"Ray did not start: {error}") from None
    # Bars of several tasks would overwrite each other; each stage reports when it is done.
    ray.data.DataContext.get_current().enable_progress_bars = False
    keep_reasons()
    print(f"Ray is up; its dashboard: http://{context.dashboard_url}", flush=True)


def quieten_loggers() -> None:
    """Leaves the screen to the stages; runs here and in every worker."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def run_demo(config: PipelineConfig, *, serve_only: bool = False) -> list[str]:
    """All stages and the HTTP checks; returns what fell short, a sentence each."""
    stages = ROAD[-1:] if serve_only else ROAD
    if config.generate is not None and not serve_only:
        stages = (("a synthetic shop", generate.run), *stages)
    started = time.perf_counter()
    reports = {}
    for number, (title, run) in enumerate(stages, start=1):
        report = _run_stage(f"[{number}/{len(stages)}] {title}", run, config)
        reports[report.job] = report

    if serve_only:
        print(_curl_lines(config), flush=True)
        return []
    print("\nReal requests", flush=True)
    checks = check_endpoint(config)
    for check in checks:
        print(f"  {'ok ' if check.passed else 'NOT'}  {check.title}: {check.seen}", flush=True)
    print("\n" + open_run(config, None).evaluation()["table"])
    print(f"\nAll stages: {time.perf_counter() - started:.0f} s")
    print(_curl_lines(config), flush=True)
    return _shortfalls(reports, checks)


def wait_or_exit(stop: bool, shortfalls: list[str]) -> None:
    """Prints the verdict; then exits with it, or serves until Ctrl-C."""
    for shortfall in shortfalls:
        print(f"FELL SHORT: {shortfall}", flush=True)
    if not shortfalls:
        print("Every stage did what it should.", flush=True)
    if stop:
        raise SystemExit(1 if shortfalls else 0)
    print("Serving until Ctrl-C.", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("\nstopped")


def _run_stage(
    title: str, run: Callable[[PipelineConfig], Report], config: PipelineConfig
) -> Report:
    print(f"\n{title}", flush=True)
    started = time.perf_counter()
    report = run(config)
    print(f"{report.text()}\n  ({time.perf_counter() - started:.1f} s)", flush=True)
    return report


def _shortfalls(reports: dict[str, Report], checks: list[Check]) -> list[str]:
    found = [f"{check.title}: {check.seen}" for check in checks if not check.passed]
    if "evaluate" in reports and not reports["evaluate"].figures["beats_all_baselines"]:
        found.insert(0, "the model does not beat every baseline on NDCG@10")
    return found


def _curl_lines(config: PipelineConfig) -> str:
    url = f"http://{config.serve.host}:{config.serve.port}"
    example = example_user(config)
    bodies = ({"user_id": example.user_id, "top_k": 5}, {"user_history": example.item_ids})
    header = "-H 'content-type: application/json'"
    posts = [f"  curl -s {url}/v1/recommend {header} -d '{json.dumps(body)}'" for body in bodies]
    return "\n".join(["\nTry it:", *posts, f"  curl -s {url}/health", f"  {url}/docs"])


if __name__ == "__main__":
    main()

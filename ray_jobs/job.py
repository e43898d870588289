"""What every job shares: its command line, its configuration, and how it ends.

python -m ray_jobs.<job> --config ray_jobs/configs/synthetic.toml --set train.max_epochs=3 --dry-run
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError

from ray_jobs.config import CONFIGS, PipelineConfig
from ray_jobs.errors import ConfigError
from ray_jobs.reasons import OURS, keep_reasons, sentence_of

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Lets the C library ask for huge pages where Linux gives them on request: fewer misses, and fewer
pages that are faulted in, in every step of a training on a CPU. Read when a process starts."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """How a job ended: a headline, figures that a person reads, and the same as data."""

    job: str
    headline: str
    figures: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        width = max((len(name) for name in self.figures), default=0)
        rows = [f"  {name:<{width}}  {_readable(value)}" for name, value in self.figures.items()]
        return "\n".join([f"{self.job}: {self.headline}", *rows])

    def json_line(self) -> str:
        return json.dumps({"job": self.job, "headline": self.headline, **self.figures}, default=str)


def main(
    run: Callable[[PipelineConfig], Report],
    *,
    job: str,
    argv: Sequence[str] | None = None,
    preview: Callable[[PipelineConfig], dict[str, Any]] | None = None,
) -> None:
    """Parses the command line, connects to Ray, runs the job and exits: 0 done, 1 failed, 2 wrong
    arguments.

    Args:
        preview: what a dry run finds out and shows beside the configuration; without Ray, unless
            there is something that has to be measured.
    """
    arguments = parse_arguments(job, run.__module__, argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        config = load_config(arguments.config, arguments.set)
    except ConfigError as error:
        _fail(job, error, 2)
    try:
        if arguments.dry_run:
            found = preview(config) if preview is not None else {}
            print(json.dumps(config.model_dump(mode="json") | found, indent=2))
            return
        with connected():
            report = run(config)
    except OURS as error:
        _fail(job, error, 1)
    print(report.text())
    print(report.json_line(), flush=True)


def parse_arguments(job: str, module: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The three options that every job has."""
    description = (sys.modules[module].__doc__ or "").strip()
    parser = argparse.ArgumentParser(
        prog=f"python -m ray_jobs.{job}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        required=True,
        help="a TOML file, or the name of one that comes with the package: "
        + ", ".join(builtin_configs()),
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, e.g. train.max_epochs=3; repeatable",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and start nothing"
    )
    return parser.parse_args(argv)


def builtin_configs() -> list[str]:
    """Names of the configurations inside the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def load_config(name: str, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Reads a TOML file, applies `key=value` overrides and validates; names every wrong key at
    once.

    Raises: ConfigError when the file is missing, is not TOML, or has a key or a value that does not
        fit.
    """
    path = CONFIGS / f"{name}.toml" if name in builtin_configs() else Path(name)
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"There is no configuration {name!r}; give a path, or one of: "
            f"{', '.join(builtin_configs())}."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None

    for override in overrides:
        _apply_override(raw, override)
    try:
        return PipelineConfig.model_validate(raw)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
        )
        raise ConfigError(f"{path} does not fit: {wrong}.") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} is not KEY=VALUE, e.g. --set train.max_epochs=3.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string

    *parents, leaf = key.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is a value, not a section.")
    raw[leaf] = value


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """A connection to the cluster that submitted us, or a Ray of our own that ends with us."""
    keep_reasons()
    if ray.is_initialized():
        yield
        return
    if "RAY_ADDRESS" not in os.environ:
        # A private Ray on the loopback needs no token; a cluster's own mode is never touched.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # Its workers inherit what is set now; those of a cluster have what its manifest says.
        for name, value in HUGE_PAGES.items():
            os.environ.setdefault(name, value)
    ray.init(log_to_driver=True, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    """Logs how long a step took."""
    start = time.perf_counter()
    yield
    log.info("%s: %.1f s", name, time.perf_counter() - start)


def _readable(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 10 else f"{value:,.1f}"
    return str(value)


def _fail(job: str, error: Exception, status: int) -> None:
    print(f"{job} failed: {sentence_of(error)}", file=sys.stderr, flush=True)
    raise SystemExit(status)

"""Looks into the registry of versions and says which of them serve. Starts no Ray.

    python -m ray_jobs.registry list --config synthetic
    python -m ray_jobs.registry show VERSION --config synthetic --json
    python -m ray_jobs.registry promote VERSION --share 0.05 --config synthetic
    python -m ray_jobs.registry rollback --config synthetic
    python -m ray_jobs.registry repair --config synthetic

What serves follows the registry by itself within seconds. `repair` brings back the last state that
was written where SERVING.json is damaged; processes that serve keep what they have meanwhile.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray_jobs.errors import ConfigError, JobError
from ray_jobs.job import builtin_configs, load_config
from recsys.errors import ArtifactError, RecsysError
from recsys.leaderboard import HEADLINE
from recsys.lineage import Version, describe_version
from recsys.registry import Serving, list_versions, promote, read_serving, repair, roll_back

_COLUMNS = ("version", "visitors", "NDCG@10 (95 %)", "HR@10", "run", "events", "published")


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, does what was asked, and exits: 0 done, 1 failed, 2 wrong arguments."""
    arguments = parse_arguments(argv)
    try:
        root = find_root(arguments.config, arguments.set)
        facts, text = act(root, arguments)
    except (RecsysError, JobError, OSError) as error:
        print(f"registry failed: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    print(json.dumps(facts, indent=1) if arguments.json else text, flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """A command with its options."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config",
        required=True,
        help="whose registry: a TOML file, or one of " + ", ".join(builtin_configs()),
    )
    common.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    common.add_argument("--json", action="store_true", help="print JSON for a program")
    parser = argparse.ArgumentParser(
        prog="python -m ray_jobs.registry",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", parents=[common], help="all versions with their figures")
    show = commands.add_parser("show", parents=[common], help="one version and its lineage")
    give = commands.add_parser("promote", parents=[common], help="give a version visitors")
    commands.add_parser("rollback", parents=[common], help="end canaries, else the last promotion")
    commands.add_parser("repair", parents=[common], help="bring back a damaged SERVING.json")
    for command in (show, give):
        command.add_argument("version")
    give.add_argument(
        "--share", type=float, default=1.0, help="of the visitors; 1 makes it the champion"
    )
    return parser.parse_args(argv)


def find_root(config: str, overrides: Sequence[str] = ()) -> Path:
    """The folder of versions. Raises: ConfigError; JobError when it is none."""
    uri = load_config(config, overrides).storage.registry_uri
    root = Path(uri)
    if not root.is_dir():
        raise JobError(f"There is no registry in {uri}; run ray_jobs.publish first.")
    return root


def act(root: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Does one command; returns what happened as data and as text. Raises: ArtifactError."""
    match arguments.command:
        case "list":
            return _list(root)
        case "show":
            return _show(describe_version(root, arguments.version, _try_serving(root)[0]))
        case "promote":
            return _serves(promote(root, arguments.version, arguments.share))
        case "rollback":
            return _serves(roll_back(root))
        case _:
            done = repair(root)
            return {"repaired": done}, done


def _list(root: Path) -> tuple[dict[str, Any], str]:
    serving, fault = _try_serving(root)
    faults, versions = [] if fault is None else [fault], []
    for name in list_versions(root):
        try:
            versions.append(describe_version(root, name, serving))
        except ArtifactError as error:
            faults.append(str(error))
    rows = [_COLUMNS, *(_row(version) for version in versions)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_align(row, widths) for row in rows]
    facts = {"faults": faults, "versions": [version.facts() for version in versions]}
    return facts, "\n".join([*lines, *faults])


def _align(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join(cells).rstrip()


def _show(version: Version) -> tuple[dict[str, Any], str]:
    lines = [f"{name:<16} {value}" for name, value in _describe(version) if value]
    return version.facts(), "\n".join(lines)


def _serves(serving: Serving) -> tuple[dict[str, Any], str]:
    shares = {version: serving.share_of(version) for version in serving.versions}
    text = ", ".join(f"{version}: {share:.1%}" for version, share in shares.items())
    return {"champion": serving.champion, "shares": shares}, f"serves now: {text}"


def _try_serving(root: Path) -> tuple[Serving | None, str | None]:
    """What serves, or why that is not known: versions can be looked at all the same."""
    try:
        return read_serving(root), None
    except ArtifactError as error:
        return None, str(error)


def _row(version: Version) -> tuple[str, ...]:
    visitors = f"{version.share:.1%}" if version.share else "-"
    return (
        version.version,
        f"{visitors} champion" if version.is_champion else visitors,
        _interval(version.metrics.get(HEADLINE)),
        f"{version.metrics['HR@10']['mean']:.4f}" if "HR@10" in version.metrics else "-",
        version.run or "-",
        _or_dash(version.tables["events"]),
        version.published_at or "-",
    )


def _describe(version: Version) -> list[tuple[str, str | None]]:
    """The way back from a version to the tables, a line a station."""
    tables = [f"{name} {number}" for name, number in version.tables.items() if number is not None]
    started, retrain = version.started_from, version.retrain
    metrics = [f"{name} {_interval(found)}" for name, found in version.metrics.items()]
    code = [f"{name} {digest[:12]}" for name, digest in version.code.items() if digest]
    users = f" on {version.num_test_users:,} users" if version.num_test_users else ""
    return [
        ("version", f"{version.version} (number {version.number})"),
        ("serves", _row(version)[1]),
        ("published", version.published_at),
        ("metrics", f"{', '.join(metrics)}{users}" if metrics else None),
        ("tables", ", ".join(tables)),
        ("rules", version.rules),
        ("run", version.run),
        ("recipe", version.recipe),
        ("seed", _or_dash(version.seed)),
        ("trained until", _moment(version.trained_until_us)),
        ("started from", started["version"] if started else "random weights"),
        ("retraining", retrain["name"] if retrain else None),
        *(
            ("canary", f"{one['at']}: {one['decision']}; {one['reason']}")
            for one in version.decisions
        ),
        ("weights", version.weights_sha256),
        ("code", ", ".join(code)),
    ]


def _interval(found: Any) -> str:
    if not found:
        return "-"
    return f"{found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def _moment(time_us: int | None) -> str | None:
    if time_us is None:
        return None
    return datetime.fromtimestamp(time_us / 1_000_000, UTC).isoformat(timespec="seconds")


def _or_dash(number: int | None) -> str:
    return "-" if number is None else str(number)


if __name__ == "__main__":
    main()

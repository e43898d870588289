"""The report of a retraining: whether it passed, at which gate it stopped, and on what figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_jobs.document import Block, Details, Heading, Picture, Table, Text, write_document
from ray_jobs.plots import draw_against, to_svg
from ray_jobs.retraining.gates import Verdict
from ray_jobs.retraining.state import State

_REMEDY = (
    "Nothing was trained. If the week is right after all, begin anew under another retrain.name "
    'with a wider limit, or with retrain.skip = ["data"]. If the feed is broken, its events must '
    "leave the lake before it is delivered again, for an event is taken once: python -m "
    "ray_jobs.withdraw with withdraw.retrain = {name} takes out what this retraining brought "
    "({tables} were the last ones without), or names the files with withdraw.files."
)


def write_retrain_report(folder: Path, state: State, titles: Mapping[str, str]) -> None:
    """Writes `report.html`, `report.md` and `report.json`.

    Args:
        titles: what each step does, by its name.
    """
    closed = state.closed
    blocks: list[Block] = [
        Heading(f"Retraining {state.name}", level=1),
        Text(describe_outcome(state)),
        Table(("", ""), _summary(state), is_words=True),
        Heading("Gates"),
        Table(("gate", "", "figure", "limit", "what was found"), _gates(state), is_words=True),
        *_weeks(state),
        *_comparison(state),
        Heading("Steps"),
        Table(("step", "seconds"), _steps(state, titles)),
        Details("All figures", [Table(("", ""), _figures(state), is_words=True)]),
    ]
    write_document(folder, "report", blocks)
    content = {
        "passed": closed is None,
        "stopped_at": None if closed is None else closed.gate,
        "outcome": describe_outcome(state),
        **state.facts(),
    }
    (folder / "report.json").write_text(json.dumps(content, indent=1))


def describe_outcome(state: State) -> str:
    """How it ended, and what to do next."""
    closed = state.closed
    if closed is None:
        return f"Every gate is open. {_describe_serving(state)}"
    text = f"Stopped at the gate {closed.gate!r}: {closed.text} {state.champion} serves on."
    if "train" in state.steps:
        return text
    remedy = _REMEDY.format(name=state.name, tables=_describe_versions_before(state))
    return f"{text} {remedy}"


def _describe_versions_before(state: State) -> str:
    found = {
        name: _figure(state, "ingest", f"{name}_version_before")
        for name in ("events", "quarantine")
    }
    versions = [f"version {number} of {name}" for name, number in found.items() if number]
    return " and ".join(versions) or "the versions of events and quarantine before it"


def _describe_serving(state: State) -> str:
    version = _figure(state, "publish", "version")
    if version is None:
        return f"Nothing was published; {state.champion} serves on."
    shares = _figure(state, "canary", "shares")
    if shares is None:
        return f"{version} is published and serves nobody yet; {state.champion} serves on."
    if version not in shares:
        return f"{version} serves."
    return (
        f"{version} meets {shares[version]:.0%} of the visitors beside {state.champion}; "
        "python -m ray_jobs.canary promotes it or rolls it back when they have shown which is "
        f"better, and ray_jobs.registry promote {version} or rollback at once."
    )


def _summary(state: State) -> list[tuple[str, str]]:
    rows = [
        ("Champion", state.champion),
        ("Challenger", _figure(state, "publish", "version") or state.run),
        ("End of the newest week", state.as_of.isoformat(timespec="minutes")),
        ("Version of the events", str(_figure(state, "ingest", "events_version"))),
        ("Version of the sequences", str(_figure(state, "sequences", "sequences_version"))),
    ]
    return [(name, value) for name, value in rows if value != "None"]


def _gates(state: State) -> list[tuple[str, ...]]:
    return [_gate(verdict) for verdict in state.verdicts]


def _gate(verdict: Verdict) -> tuple[str, ...]:
    figure = "-" if verdict.figure is None else f"{verdict.figure:.4g}"
    word = "open" if verdict.passed else "CLOSED"
    return verdict.gate, word, figure, f"{verdict.limit:g}", verdict.text


def _weeks(state: State) -> list[Block]:
    weeks = _figure(state, "data", "weeks")
    if weeks is None:
        return []
    columns = ("unknown_shares", "divergences", "agreements")
    lines = [
        (
            _name_week(week, weeks["num_new"]),
            f"{rows:,}",
            *(f"{weeks[name][week]:.3f}" if week < weeks["num_new"] else "" for name in columns),
        )
        for week, rows in enumerate(weeks["rows_W"])
    ]
    header = ("week", "events", "unknown items", "divergence, bits", "agreement, bits")
    return [Heading("Weeks"), Table(header, lines)]


def _name_week(week: int, num_new: int) -> str:
    ago = "newest" if week == 0 else f"{week} before"
    return f"{ago}, new" if week < num_new else ago


def _comparison(state: State) -> list[Block]:
    if "compare" not in state.steps:
        return []
    found = state.steps["compare"].figures
    lines = [(name, _interval(facts)) for name, facts in found["metrics"].items()]
    return [
        Heading(f"Against {found['champion']}"),
        Text(
            f"Both versions rank the same {found['num_users']:,} held-out events; "
            f"{found['num_targets_unknown_to_champion']:,} of them are on items that the champion "
            "does not know, which count as missed, as they are for visitors."
        ),
        Picture(
            "against",
            "the challenger minus the champion",
            to_svg(draw_against(found["metrics"], state.run, found["champion"])),
        ),
        Table(("", "difference, 95 % interval"), lines),
    ]


def _interval(facts: Mapping[str, Any]) -> str:
    mean, low, high = (facts[f"difference{end}"] for end in ("", "_low", "_high"))
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _steps(state: State, titles: Mapping[str, str]) -> list[tuple[str, ...]]:
    return [
        (f"{name}: {titles.get(name, '')}", f"{done.seconds:,.1f}")
        for name, done in state.steps.items()
    ]


def _figures(state: State) -> list[tuple[str, str]]:
    return [
        (f"{name}.{key}", json.dumps(value, default=str))
        for name, done in state.steps.items()
        for key, value in done.figures.items()
    ]


def _figure(state: State, step: str, name: str) -> Any:
    """A figure of a step, None where it was not taken."""
    return state.steps[step].figures.get(name) if step in state.steps else None

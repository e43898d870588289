"""The report of a monitoring: what report.json says, to be read by a person."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_jobs.document import (
    Block,
    Code,
    Details,
    Heading,
    Picture,
    Table,
    Text,
    write_document,
)
from ray_jobs.plots import draw_drift, draw_shares, to_svg

Facts = Mapping[str, Any]

_MEANINGS = {
    "popularity": "events on items that half of the events fall on (head), the next 40 % (torso), "
    "the rest (tail), or none (unseen); what counts is the other half of the users in both "
    "periods",
    "items": "events by item, in 64 groups of items by hash",
    "categories": "events by category of the item",
    "context_hour": "events by hour on the shop's clock",
    "history_length": "events by the number of the user's events before, see monitor.history_days",
    "scores": "score of the first item of lists of this version, in deciles",
    "unknown_items": "share of events on items that the version does not know; in the reference "
    "period, that one trained just before the window could not have known",
    "live_hit_rate": "share of lists with the visitor's next event among the first ten, of lists "
    "that an event followed in time",
    "live_click_through": "share of lists with an item that the visitor turned to in time; lists "
    "that no user id but a session is known of count where the lake has events of the session",
    "coverage": "share of the catalogue that equally many lists of either period show",
}
_HOW = (
    "Drift is the population stability index (PSI) of two histograms, and of a share by how much "
    "it rose (unknown items) or fell (hit rate, click-through); of coverage the difference. A bin "
    "that one period lacks is smoothed, and values that the version does not know are one bin of "
    "their own. Thresholds are what chance makes of drift: windows of both periods are exchanged "
    "at random within groups of users, and one is compared with the others; {rate:.1%} of these "
    "are beyond any threshold, and so are as many runs without drift. Dispersion is how much more "
    "days vary than users explain; thresholds are raised by it. What a single user does, "
    "however much, is seldom an alarm."
)


def write_drift_report(folder: Path, facts: Facts) -> None:
    """Writes `report.html`, `report.md` and `plots/`.

    Args:
        facts: the content of report.json.
    """
    measures = facts["measures"]
    blocks: list[Block] = [
        Heading(f"Drift of {facts['data']}, version {facts['version']}", level=1),
        Text(describe_verdict(facts)),
        _summary(facts),
        *_overview(measures),
        *_gaps(facts["gaps"]),
        *_shares(measures),
        Heading("How it was made"),
        Text(_HOW.format(rate=facts["false_alarm_rate"])),
        Details(
            "What it was made from",
            [Code(json.dumps(facts["made_from"], indent=1))],
        ),
    ]
    write_document(folder, "report", blocks)


def describe_verdict(facts: Facts) -> str:
    """Which measures moved, in a sentence."""
    alarms = [name for name, found in facts["measures"].items() if found["alarm"]]
    judged = len(facts["measures"])
    if not judged:
        return "No measure could be judged."
    if not alarms:
        return f"None of {judged} measures moved beyond what happens without drift."
    return f"{len(alarms)} of {judged} measures moved: {', '.join(alarms)}."


def _summary(facts: Facts) -> Table:
    periods, current = facts["periods"], facts["current"]
    rows = [
        ("Reference period", f"{periods['reference_from']} to {periods['reference_until']}"),
        ("Current period", f"{periods['current_from']} to {periods['current_until']}"),
        ("Unknown items", _share(current["unknown_items"])),
        ("Live HR@10", _share(current["live_hit_rate"])),
        ("Live click-through", _share(current["live_click_through"])),
        ("Age of the version", _days(facts["serving_version_age_s"])),
        ("Age of the newest event", _days(facts["newest_event_age_s"])),
        ("Written", facts["written_at"]),
    ]
    return Table(("", ""), rows, is_words=True)


def _overview(measures: Facts) -> list[Block]:
    if not measures:
        return []
    header = ("", "drift", "threshold", "alarm", "usual", "dispersion", "reference", "current")
    rows = [
        (
            name,
            f"{found['drift']:.4f}",
            f"{found['threshold']:.4f}",
            "yes" if found["alarm"] else "no",
            f"{found['usual']:.4f}",
            f"{found['dispersion']:.2f}",
            *(_side(found, side) for side in ("reference", "current")),
        )
        for name, found in measures.items()
    ]
    meanings = [(name, _meaning(name)) for name in measures]
    return [
        Heading("What moved"),
        Picture("drift", "drift of each measure", to_svg(draw_drift(measures))),
        Table(header, rows),
        Details("What the measures are", [Table(("", ""), meanings, is_words=True)]),
    ]


def _gaps(gaps: Mapping[str, str]) -> list[Block]:
    if not gaps:
        return []
    return [
        Heading("What could not be judged"),
        Table(("", ""), list(gaps.items()), is_words=True),
    ]


def _shares(measures: Facts) -> list[Block]:
    """Pictures of the histograms; those without alarm are folded as tables."""
    blocks: list[Block] = []
    for name, found in measures.items():
        if found["kind"] != "shares":
            continue
        if found["alarm"]:
            blocks.append(Picture(f"shares-{name}", name, to_svg(draw_shares(name, found))))
        rows = [
            (label, _share(reference), _share(current))
            for label, reference, current in zip(
                found["labels"], found["reference"], found["current"], strict=True
            )
        ]
        title = f"{name}: Jensen-Shannon divergence {found['jensen_shannon']:.4f} bits"
        blocks.append(Details(title, [Table(("", "reference", "current"), rows)]))
    return [Heading("Shares"), *blocks] if blocks else []


def _side(found: Facts, side: str) -> str:
    """The share of one period, or of how many counts its histogram is."""
    return f"{found[f'num_{side}']:,}" if found["kind"] == "shares" else _share(found[side])


def _meaning(name: str) -> str:
    return _MEANINGS.get(name, f"events by {name.removeprefix('context_')}")


def _share(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2%}"


def _days(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds / 86_400:.1f} days"

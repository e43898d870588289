"""The report of an evaluated run: what evaluation.json and run.json say, to be read by a person."""

import json
import re
from collections.abc import Mapping
from datetime import datetime
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
from ray_jobs.plots import (
    LIST_TITLES,
    draw_against,
    draw_lists,
    draw_rows,
    draw_slices,
    draw_training,
    to_svg,
)
from recsys.leaderboard import HEADLINE
from recsys.metrics import CUTOFFS

Facts = Mapping[str, Any]

_MODEL = "model"
_MAX_DRAWN = 15
_LEAST_DRAWN_USERS = 20
"""The means of fewer are so far apart that they would set the scale."""
_SLICE_TITLES = {
    "history_length": "NDCG@10 by events before the target",
    "item_training_events": "NDCG@10 by training events of the target (0: cold items)",
    "time_since_last_event": "NDCG@10 by time since the user's last event",
    "hour": "NDCG@10 by hour of the request",
    "weekday": "NDCG@10 by weekday of the request",
}
_LIST_MEANINGS = (
    "Coverage: share of the catalogue in at least one list of ten. Gini index: how unequally the "
    "items of the catalogue are shown, 0 if all equally often, 1 if one alone. Novelty: mean "
    "self-information of a shown item by its share of the training events. Popularity: mean "
    "percentile of a shown item by training events, 0.5 for random lists. Diversity: share of the "
    "pairs in a list whose categories differ."
)


def write_report(folder: Path, evaluation: Facts, facts: Facts) -> None:
    """Writes `report.html`, `report.md` and `plots/` into a run folder.

    Args:
        evaluation: the content of evaluation.json.
        facts: the content of run.json.
    """
    blocks: list[Block] = [
        Heading(f"Evaluation of {evaluation['run']}", level=1),
        Text(describe_result(evaluation)),
        _summary(evaluation, facts),
        *_accuracy(evaluation),
        *_against(evaluation),
        *_training(facts),
        *_slices(evaluation),
        *_lists(evaluation),
        Heading("How it was made"),
        Code(evaluation["command"]),
        Details("The recipe", [Code(json.dumps(facts["recipe"], indent=1))]),
    ]
    write_document(folder, "report", blocks)


def describe_cut(protocol: Facts) -> str:
    """The split in words, with its dates where it has any."""
    if protocol["kind"] != "temporal-cut":
        return "the last event of each user tests, the one before validates"
    return f"{describe_dates(protocol)}, {describe_cut_target(protocol)}"


def describe_dates(protocol: Facts) -> str:
    """Of a temporal cut: when each part begins."""
    validation, test = (_date(protocol[key]) for key in ("validation_from", "test_from"))
    return f"training before {validation}, validation from then on, test from {test}"


def describe_cut_target(protocol: Facts) -> str:
    """Of a temporal cut: which event of a user is the target after each date."""
    return f"the {protocol.get('cut_target', 'first')} target event of a user in each"


def describe_result(evaluation: Facts) -> str:
    """The figure that counts, and how it stands to the strongest baseline."""
    found = evaluation["rows"][_MODEL][HEADLINE]
    text = (
        f"{HEADLINE} {_with_interval(found)} on {evaluation['num_users']:,} test users and "
        f"{evaluation['num_items']:,} items"
    )
    strongest = evaluation["strongest_baseline"]
    if strongest is None:
        return f"{text}."
    comparison = evaluation["comparisons"][strongest]
    side = "above" if comparison["difference"] > 0 else "below"
    noise = "beyond noise" if comparison["is_significant"] else "within noise"
    return f"{text}: {side} {strongest}, the strongest baseline, {noise} ({_lift(comparison)})."


def _summary(evaluation: Facts, facts: Facts) -> Table:
    protocol, built = evaluation["protocol"], evaluation["sequences_from"] or {}
    seen = "left out of the ranking" if evaluation["filter_seen"] else "ranked like all others"
    versions = {
        "sequences": evaluation["sequences_version"],
        "events": built.get("events_version"),
        "users": built.get("users_version"),
        "items": evaluation["items_version"],
    }
    known = [f"{name} {version}" for name, version in versions.items() if version is not None]
    of_all = f"{evaluation['num_users']:,} of {evaluation['num_test_users']:,} with a test event"
    rows = [
        ("Protocol", f"{protocol['kind']}: {describe_cut(protocol)}"),
        ("Targets", ", ".join(evaluation["target_event_types"]) or "events of every type"),
        ("Ranking", "the whole catalogue; a tie counts against the target"),
        ("Items seen before", seen),
        ("Users", of_all),
        ("Items", f"{evaluation['num_items']:,}"),
        ("Test pairs (sha256)", evaluation["targets_sha256"]),
        ("Versions of the tables", ", ".join(known)),
        ("Recipe", evaluation["recipe"]),
        ("Seeds", f"training {facts['seed']}, sample and intervals {evaluation['seed']}"),
        ("Intervals", "95 %, bootstrap over users; comparisons are paired"),
        ("Clock of hours and weekdays", evaluation["timezone"]),
        ("Evaluated", evaluation["evaluated_at"]),
    ]
    return Table(("", ""), rows, is_words=True)


def _accuracy(evaluation: Facts) -> list[Block]:
    rows, strongest = evaluation["rows"], evaluation["strongest_baseline"]
    blocks: list[Block] = [
        Heading("Model and baselines"),
        _picture("rows", "NDCG@10 and HR@10 of each row", draw_rows(rows, strongest)),
        Text(
            'The row "model" knows the context of the request, its time included; the row "model, '
            'time-blind" does not.'
        ),
    ]
    for name, reason in evaluation["skipped_baselines"].items():
        blocks.append(Text(f"Left out: {name} ({reason})."))
    # Reports of before baselines were tuned are rendered again, too.
    for name, trials in evaluation.get("baseline_trials", {}).items():
        blocks.append(Text(_describe_choice(name, evaluation["baseline_settings"][name], trials)))
    if evaluation["comparisons"]:
        blocks += [
            Heading("The model's NDCG@10 against each baseline", level=3),
            Table(("", "model", "model, time-blind"), _lifts(evaluation)),
        ]
    metrics = []
    for kind in ("HR", "NDCG", "MRR"):
        names = [f"{kind}@{k}" for k in CUTOFFS]
        lines = [(row, *(_with_interval(rows[row][name]) for name in names)) for row in rows]
        metrics.append(Table(("", *names), lines))
    return [*blocks, Details("All metrics with their intervals", metrics)]


def _describe_choice(name: str, settings: Facts, trials: list[Facts]) -> str:
    chosen = ", ".join(f"{setting} {value:g}" for setting, value in settings.items())
    scores = sorted(trial["ndcg10"] for trial in trials)
    return (
        f"Settings of {name}: {chosen}; of {len(trials)} on validation targets, whose {HEADLINE} "
        f"went from {scores[0]:.4f} to {scores[-1]:.4f}."
    )


def _lifts(evaluation: Facts) -> list[tuple[str, ...]]:
    aware, blind = evaluation["comparisons"], evaluation["comparisons_time_blind"]
    return [(name, _lift(aware[name]), _lift(blind[name])) for name in aware]


def _against(evaluation: Facts) -> list[Block]:
    against = evaluation["against"]
    if against is None:
        return []
    ours, theirs = evaluation["run"], against["run"]
    found = against["rows"][_MODEL]
    others = {name: rows for name, rows in against["rows"].items() if name != _MODEL}
    return [
        Heading(f"Against the run {theirs}"),
        Text(
            f"{theirs} ({against['recipe']}) ranked the same targets; the two are compared user by "
            "user. Hollow points: 0 lies within the interval."
        ),
        _picture("against", f"{ours} minus {theirs}", draw_against(found, ours, theirs)),
        _against_table(found),
        *(Details(f"The row {name}", [_against_table(rows)]) for name, rows in others.items()),
    ]


def _against_table(comparisons: Facts) -> Table:
    lines = [(name, _difference(found), _lift(found)) for name, found in comparisons.items()]
    return Table(("", "difference", "lift"), lines)


def _training(facts: Facts) -> list[Block]:
    history, best = facts["history"], facts["best"]
    return [
        Heading("Training"),
        _picture("training", "loss and NDCG@10 by epoch", draw_training(history, best["epoch"])),
        Text(
            f"{len(history)} epochs; the weights of epoch {best['epoch']} were kept, with NDCG@10 "
            f"{best['ndcg10']:.4f} on validation."
        ),
    ]


def _slices(evaluation: Facts) -> list[Block]:
    blocks: list[Block] = [Heading("Where it is good and where it is not")]
    strongest = evaluation["strongest_baseline"]
    for name, model in evaluation["slices"].items():
        baseline = evaluation["baseline_slices"].get(name, {})
        if len(model) < 2:
            continue  # one part is all users
        title = _SLICE_TITLES.get(name, f"NDCG@10 by {name.replace('_', ' ')}")
        is_clock = name == "hour"
        drawn = model if is_clock else _choose_drawn(model)
        of_baseline = {label: baseline[label] for label in drawn if label in baseline}
        figure = draw_slices(title, drawn, of_baseline, strongest, as_lines=is_clock)
        file = re.sub(r"[^\w-]", "_", name)
        blocks.append(_picture(f"slice-{file}", title, figure))
        if len(drawn) < len(model):
            blocks.append(Text(f"Drawn are the {len(drawn)} of {len(model)} with the most users."))
        blocks.append(Details("The figures", [_slice_table(model, baseline, strongest)]))
    return blocks


def _slice_table(model: Facts, baseline: Facts, strongest: str | None) -> Table:
    header = ("", "users", _MODEL, *([strongest] if strongest else []))
    lines = [
        (label, f"{found['num_users']:,}", *map(_with_interval, _of(label, model, baseline)))
        for label, found in model.items()
    ]
    return Table(header, lines)


def _of(label: str, *parts: Facts) -> list[Facts]:
    return [of_row[label] for of_row in parts if label in of_row]


def _choose_drawn(parts: Facts) -> Facts:
    """The parts with the most users, as many as a picture holds, in their own order; two at
    least.
    """
    by_size = sorted(parts, key=lambda label: -parts[label]["num_users"])[:_MAX_DRAWN]
    large = [label for label in by_size if parts[label]["num_users"] >= _LEAST_DRAWN_USERS]
    kept = large if len(large) > 1 else by_size
    return {label: found for label, found in parts.items() if label in kept}


def _lists(evaluation: Facts) -> list[Block]:
    rows = evaluation["rows"]
    names = [name for name in LIST_TITLES if name in rows[_MODEL]]
    lines = [(row, *(f"{facts[name]:.4f}" for name in names)) for row, facts in rows.items()]
    figure = draw_lists(rows, evaluation["strongest_baseline"])
    return [
        Heading("What the lists are like"),
        _picture("lists", "coverage, exposure, novelty, popularity, diversity", figure),
        Text(_LIST_MEANINGS),
        Details("The figures", [Table(("", *(LIST_TITLES[name] for name in names)), lines)]),
    ]


def _picture(name: str, alt: str, figure: Any) -> Picture:
    return Picture(name, alt, to_svg(figure))


def _with_interval(found: Facts) -> str:
    return f"{found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def _lift(found: Facts) -> str:
    """Relative to theirs; the difference where that is 0 in a resample."""
    if found["lift"] is None:
        return _difference(found)
    mean, low, high = (100 * found[f"lift{end}"] for end in ("", "_low", "_high"))
    return f"{mean:+.1f} % [{low:.1f}, {high:.1f}]"


def _difference(found: Facts) -> str:
    mean, low, high = (found[f"difference{end}"] for end in ("", "_low", "_high"))
    return f"{mean:+.4f} [{low:.4f}, {high:.4f}]"


def _date(text: str) -> str:
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M %Z}"

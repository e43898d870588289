"""What a search leaves behind: a configuration that trains its winner, a table and a report."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ray_jobs.config import PipelineConfig
from ray_jobs.document import Block, Code, Details, Heading, Picture, Table, Text, write_document
from ray_jobs.plots import (
    draw_asha,
    draw_importance,
    draw_objective,
    draw_parallel,
    to_svg,
)
from ray_jobs.tuning.asha import describe_doubts
from ray_jobs.tuning.space import Choice, LogUniform, Space, as_overrides
from ray_jobs.tuning.trials import Trial, best_trial, trials_table
from ray_jobs.tuning.verdict import Verdict

_SECRET = "***"
_BINS = 3
_LEAST_TRIALS = 6


@dataclass(frozen=True)
class Outcome:
    """A search at its end."""

    name: str
    config: PipelineConfig
    trials: Sequence[Trial]
    max_epochs: int
    verdict: Verdict | None
    """None where no trial counts, or the winner is the default itself."""

    @property
    def winner(self) -> Trial | None:
        return best_trial(self.trials)

    @property
    def num_fallbacks(self) -> int:
        """Trials for which the language model was not followed."""
        return sum(bool(trial.notes) for trial in self.trials)

    def num_ended(self, ending: str) -> int:
        return sum(trial.ending == ending for trial in self.trials)

    def headline(self) -> str:
        """What the search says, in one sentence."""
        winner, verdict = self.winner, self.verdict
        if winner is None:
            return f"none of {len(self.trials)} trials came to a validation"
        if verdict is None:
            return f"no trial was better than the default, of {len(self.trials)}"
        found = verdict.comparison.difference
        where = f"NDCG@10 {found.mean:+.4f} [{found.low:.4f}, {found.high:.4f}]"
        users = f"on {verdict.num_users:,} users that no trial saw"
        if verdict.wins:
            return f"trial {winner.number} beats the default, {where} {users}"
        return f"trial {winner.number} does not beat the default beyond noise, {where} {users}"


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Writes `trials.parquet`, `outcome.json`, the report and, with a winner, `best.toml`."""
    pq.write_table(trials_table(outcome.trials), folder / "trials.parquet")
    winner = outcome.winner
    facts = {
        "name": outcome.name,
        "headline": outcome.headline(),
        "winner": None if winner is None else {"number": winner.number, "values": winner.values},
        "verdict": None if outcome.verdict is None else outcome.verdict.facts(),
        "doubts": describe_doubts(outcome.trials, outcome.max_epochs),
    }
    (folder / "outcome.json").write_text(json.dumps(facts, indent=1))
    if winner is not None:
        (folder / "best.toml").write_text(best_config(outcome, winner))
    write_document(folder, "report", _blocks(outcome))


def best_config(outcome: Outcome, winner: Trial) -> str:
    """The configuration of the search with the winner's values, as TOML."""
    raw = outcome.config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    raw.pop("tune", None)
    train = raw.setdefault("train", {})
    train.pop("name", None)  # a name is that of one run
    known = outcome.config.train
    train["overrides"] = as_overrides(winner.values, known.recipe, known.overrides)
    if outcome.config.tune.max_epochs is not None:
        # The learning rate falls over so many.
        trainer = train.setdefault("trainer", {})
        trainer["max_epochs"] = outcome.config.tune.max_epochs
    head = (
        f"# Search {outcome.name}: {outcome.headline()}.\n"
        "# python -m ray_jobs.train --config best.toml\n"
    )
    return head + to_toml(_without_masks(raw))


def to_toml(raw: Mapping[str, Any]) -> str:
    """Values first, then a table for each section, whose own sections stand inline."""
    values = [f"{_key(k)} = {_value(v)}" for k, v in raw.items() if not isinstance(v, Mapping)]
    tables = [
        "\n".join([f"\n[{_key(name)}]", *(f"{_key(k)} = {_value(v)}" for k, v in section.items())])
        for name, section in raw.items()
        if isinstance(section, Mapping)
    ]
    return "\n".join([*values, *tables]) + "\n"


def _without_masks(raw: Any, key: str = "") -> Any:
    """Secrets are not written down: the environment variable of the same name takes their place."""
    if isinstance(raw, Mapping):
        return {name: _without_masks(value, name) for name, value in raw.items()}
    if isinstance(raw, str) and _SECRET in raw:
        return f"${key.upper()}"
    return raw


def _key(name: str) -> str:
    is_bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if is_bare else _text(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_value, value)) + "]"
    return _text(str(value))


def _text(text: str) -> str:
    # TOML's basic strings are JSON's, but for DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def importances(trials: Sequence[Trial], space: Space) -> dict[str, float]:
    """Share of the objective's variance that each parameter explains by itself, 0 to 1.

    Trials fall into groups by the parameter's value, ranges into three groups as large as each
    other, and what lies between the groups is adjusted for their number (epsilon squared: Kelley,
    1935). Trials in which a parameter takes no part say nothing of it; one with fewer than six
    trials is left out. What parameters do together is not in it.
    """
    counting = [trial for trial in trials if trial.counts]
    found = {}
    for path, parameter in space.parameters.items():
        taking_part = [trial for trial in counting if path in trial.values]
        if len(taking_part) < _LEAST_TRIALS:
            continue
        objectives_N = np.array([trial.objective for trial in taking_part])
        values = [trial.values[path] for trial in taking_part]
        groups_N = _groups(values, is_range=not isinstance(parameter, Choice))
        found[path] = _explained(objectives_N, groups_N)
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _groups(values: Sequence[Any], *, is_range: bool) -> np.ndarray:
    if is_range:
        ranks_N = np.argsort(np.argsort(np.array(values, float), kind="stable"))
        return ranks_N * _BINS // len(values)
    labels = [f"{type(value).__name__}:{value}" for value in values]
    groups_N: np.ndarray = np.unique(labels, return_inverse=True)[1]
    return groups_N


def _explained(objectives_N: np.ndarray, groups_N: np.ndarray) -> float:
    num, num_groups = len(objectives_N), len(np.unique(groups_N))
    total = float(((objectives_N - objectives_N.mean()) ** 2).sum())
    if num_groups < 2 or num <= num_groups or total == 0:
        return 0.0
    within = sum(
        float(((part - part.mean()) ** 2).sum())
        for part in (objectives_N[groups_N == group] for group in np.unique(groups_N))
    )
    return max(0.0, 1 - within / total * (num - 1) / (num - num_groups))


def _blocks(outcome: Outcome) -> list[Block]:
    blocks: list[Block] = [
        Heading(f"Search {outcome.name}", level=1),
        Text(f"{outcome.headline()[0].upper()}{outcome.headline()[1:]}."),
    ]
    blocks += [Text(doubt) for doubt in describe_doubts(outcome.trials, outcome.max_epochs)]
    blocks.append(_summary(outcome))
    blocks += _verdict(outcome)
    if outcome.winner is not None:
        blocks += _pictures(outcome)
    return [*blocks, *_trials(outcome), *_notes(outcome)]


def _summary(outcome: Outcome) -> Table:
    tune, trials = outcome.config.tune, outcome.trials
    endings = ("finished", "stopped", "cut-off", "failed", "out-of-memory", "lost")
    counts = [f"{outcome.num_ended(name)} {name}" for name in endings if outcome.num_ended(name)]
    rows = [
        ("Recipe", outcome.config.train.recipe),
        ("Searcher", tune.searcher),
        ("Trials", f"{len(trials)}: {', '.join(counts)}"),
        ("Epochs of a trial", f"{outcome.max_epochs} at most"),
        (
            "Stopped early",
            f"at {tune.grace_epochs} epochs or later, one in {tune.reduction:g} goes on",
        ),
        ("Objective", "NDCG@10 of the best epoch on validation users; test targets take no part"),
        ("Held out", f"{tune.held_out_share:.0%} of the validation users, for the verdict"),
        ("Seed", str(outcome.config.seed)),
    ]
    if tune.searcher == "llm":
        told = f"{outcome.num_fallbacks} of {len(trials)} trials, proposed by tpe"
        rows.append(("Language model not followed", told))
    return Table(("", ""), rows, is_words=True)


def _verdict(outcome: Outcome) -> list[Block]:
    verdict = outcome.verdict
    if verdict is None:
        return []
    seeds = zip(verdict.winner_ndcg10, verdict.default_ndcg10, verdict.by_seed, strict=True)
    rows = [
        (f"training {number}", f"{winner:.4f}", f"{default:.4f}", str(one.difference))
        for number, (winner, default, one) in enumerate(seeds, start=1)
    ]
    ours, theirs = np.mean(verdict.winner_ndcg10), np.mean(verdict.default_ndcg10)
    rows.append(("mean", f"{ours:.4f}", f"{theirs:.4f}", str(verdict.comparison.difference)))
    return [
        Heading("Winner and default, trained to the end"),
        Table(("NDCG@10", "winner", "default", "difference"), rows),
        Text(
            f"On {verdict.num_users:,} validation users that no trial saw. Intervals are 95 %, of "
            "a paired bootstrap over users: they tell of other users, not of other seeds."
        ),
    ]


def _pictures(outcome: Outcome) -> list[Block]:
    trials, space = outcome.trials, Space.of(outcome.config.tune.space)
    counting = [trial for trial in trials if trial.counts]
    logarithmic = {p for p, one in space.parameters.items() if isinstance(one, LogUniform)}
    blocks: list[Block] = [
        Heading("The search"),
        _picture("objective", "objective over time", draw_objective(_points(trials))),
        _picture("asha", "NDCG@10 of each trial by epoch", draw_asha(_curves(outcome))),
        _picture(
            "parallel",
            "values and objective of each trial",
            draw_parallel(
                [(trial.values, trial.objective) for trial in counting],
                list(space.parameters),
                logarithmic,
            ),
        ),
    ]
    found = importances(trials, space)
    if found:
        blocks += [
            _picture("importance", "importance of parameters", draw_importance(found)),
            Text(
                "Share of the objective's variance that a parameter explains by itself, over the "
                "trials in which it takes part. Trials are few and were not drawn at random: what "
                "a searcher hardly tried looks unimportant."
            ),
        ]
    return blocks


def _points(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    begin = min(trial.started_s for trial in trials)
    counting = [trial for trial in trials if trial.counts and trial.best is not None]
    return [
        {
            "minutes": (trial.ended_s - begin) / 60,
            "ndcg10": trial.objective,
            "error": 0.0 if trial.best is None else trial.best.error,
            "is_stopped": trial.ending != "finished",
        }
        for trial in sorted(counting, key=lambda one: one.ended_s)
    ]


def _curves(outcome: Outcome) -> list[dict[str, Any]]:
    winner = outcome.winner
    return [
        {
            "epochs": [epoch.epoch for epoch in trial.epochs],
            "ndcg10": [epoch.ndcg10 for epoch in trial.epochs],
            "is_stopped": trial.ending == "stopped",
            "is_winner": winner is not None and trial.number == winner.number,
        }
        for trial in outcome.trials
        if trial.epochs
    ]


def _trials(outcome: Outcome) -> list[Block]:
    ranked = sorted(
        outcome.trials,
        key=lambda trial: -math.inf if math.isnan(trial.objective) else trial.objective,
        reverse=True,
    )
    header = ("trial", "NDCG@10", "error", "epoch", "of", "ending", "proposed by", "values")
    rows = [
        (
            str(trial.number),
            *_figures(trial),
            trial.ending or "unfinished",
            trial.origin,
            ", ".join(f"{path} {_short(value)}" for path, value in trial.values.items()),
        )
        for trial in ranked
    ]
    return [Heading("Trials"), Details("All trials, the best first", [Table(header, rows)])]


def _figures(trial: Trial) -> tuple[str, str, str, str]:
    if trial.best is None:
        return ("", "", "", "0")
    best, last = trial.best, trial.epochs[-1]
    return f"{best.ndcg10:.4f}", f"{best.error:.4f}", str(best.epoch), str(last.epoch)


def _notes(outcome: Outcome) -> list[Block]:
    lines = [f"trial {trial.number}: {note}" for trial in outcome.trials for note in trial.notes]
    failures = [
        f"trial {trial.number}, {trial.ending}: {trial.reason}"
        for trial in outcome.trials
        if trial.reason
    ]
    blocks: list[Block] = []
    if failures:
        blocks.append(Details("Trials that failed", [Code("\n".join(failures))]))
    if lines:
        blocks.append(Details("How trials were proposed", [Code("\n".join(lines))]))
    return blocks


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _picture(name: str, alt: str, figure: Any) -> Picture:
    return Picture(name, alt, to_svg(figure))

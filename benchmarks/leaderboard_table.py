"""The leader board in Markdown, from what trainings, baselines and comparisons found."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from benchmarks.leaderboard_cells import METRICS, Result, render_means, render_table
from benchmarks.leaderboard_rows import GOALS, Entry, Goal, Pair
from benchmarks.leaderboard_slices import render_history, render_lists, render_slices
from benchmarks.published import name_protocol

_SHORT = {"float32": "fp32", "bfloat16": "bf16"}
_COLLABORATIVE = ("item-knn", "als", "ease")
_HEAD = (
    "| row | recipe | width/layers/heads/length, or settings | HR@10 | NDCG@10 | floor | aim "
    "| seeds | best epoch | training | published |"
)
_UNTRAINED_HEAD = "| row | recipe | data set | floor | aim | published |"
_INTRODUCTION = """# Leader board

The whole catalogue is ranked, never a sample; items of the user's history are left out; ties count
against us; the epoch is chosen by NDCG@10 on validation targets and a training ranks test once,
with that epoch's weights. That holds for a training, not for a row: some settings of
`ml-1m-gsasrec`, `beauty-sasrec-ce`, `beauty-sasrec-ce-attributes` and `beauty-recjpq` were changed
after a test figure had been seen. From now on such a change is a new row. How the vectors of a
spectral start are computed was changed, for what validation said, after three seeds of
`beauty-sasrec-ce-spectral-short` had had 0.0949 / 0.0571 and one of
`beauty-sasrec-ce-attributes-spectral` 0.1039 / 0.0607; what stands here was trained since.

Means over seeds; `±` is half of the 95 % interval that a bootstrap over the users gives for one
seed, averaged over the seeds, and says nothing of other seeds; in brackets the least and the most
of the seeds. Floor and aim are our own goals, HR@10 / NDCG@10, with ✓ where both means over the
seeds reach them and ✗ where not. A row bears the name of a recipe but replaces settings of it:
which ones stands below each table. "Published" names HR@10 / NDCG@10 of others under their own
protocols. "time-blind" is the same weights told nothing of the request.

Every figure of ours comes from a training that was run by the commands below, beside other work,
so minutes are an upper bound; `leaderboard/` beside this file has each with its settings, its
machine and its curve. Where it stands, a training counted in fp32 or bf16; it was not kept of the
first ones. Lifts are those of the means over the seeds; where the ranks of both were kept they have
an interval, paired by user (of the seeds that are named, if not of all).

The settings of a baseline are chosen by NDCG@10 on the validation targets, out of all that its
file in `leaderboard/` names; where it stands without any it has those of its class and was not
tuned. A case study of a shop like the one that nextitem is made for names +25 % HR@10 and +18 %
NDCG@10 over the collaborative filtering there.

Beyond accuracy, of the ten items that each test user is shown: coverage is the share of the
catalogue in at least one list; novelty the mean of `-log2` of an item's share of the training
events; popularity the mean percentile of an item by training events, 0.5 for random lists and
towards 1 for the most popular. Results from before these were kept have no such figures, and none
by the length of the history before the target.

Recent popularity counts, for each target, what everybody did in the hour (globo) or the seven days
before the full hour of that target, held-out events of others among it, as a live shop would;
nothing at or after that hour. beauty and ml-1m.txt have no times: they cannot be cut by the clock
and have no such row; ml-1m is the log of ml-1m.txt with times and with its rarest items.

In our copy of ml-1m's ratings.dat the times of ratings of 3 and less before December 2nd, 2000 are
interpolated; what reads times may profit from that, so the targets with original times have figures
of their own. No row of globo reads the gap before a click: that log invents the time of the last
click of a session, 30,000 ms after the one before, so the gap at a request would say that its click
is the last, as the targets of leave-one-out all are."""


def render(found: list[Result], entries: Mapping[str, Entry]) -> str:
    """One section for each data set and protocol, and one of the rows without any result."""
    sections: dict[tuple[str, str], list[Result]] = {}
    for result in found:
        sections.setdefault((result["dataset"], result["protocol"]), []).append(result)
    texts = [_render_section(results, entries) for _, results in sorted(sections.items())]
    trained = {result["row"] for result in found if "seed" in result}
    untrained = {name: entry for name, entry in entries.items() if name not in trained}
    if untrained:
        texts.append(_render_untrained(untrained))
    return "\n\n".join([_INTRODUCTION, *texts]) + "\n"


def _render_section(results: list[Result], entries: Mapping[str, Entry]) -> str:
    some = next(result for result in results if "test" in result)
    (sha256,) = {result["targets_sha256"] for result in results}
    by_row: dict[str, list[Result]] = {}
    for result in results:
        if "seed" in result:
            by_row.setdefault(result["row"], []).append(result)
    by_row = dict(sorted(by_row.items(), key=lambda row: _mean(row[1], "NDCG@10"), reverse=True))
    baselines = [result for result in results if "baselines" in result]
    measured = [*chain.from_iterable(by_row.values()), *baselines]

    rows = [
        _row(seeds, knowing, entries[name])
        for name, seeds in by_row.items()
        for knowing in seeds[0]["test"]
    ]
    rows += [
        f"| | {name} | {_chosen(result, name)} | {render_means([test])} |" + " |" * 6
        for result in baselines
        for name, test in result["test"].items()
    ]
    facts = (
        f"{some['num_users']:,} test users, {some['num_items']:,} items. sha256 of the test pairs: "
        f"`{sha256}`."
    )
    lifts = {result["lift_of"]: result for result in results if "lift_of" in result}
    parts = [
        f"## {some['dataset']}, {some['protocol']}",
        facts,
        _machines(measured),
        render_table(_HEAD, rows),
        *(_goal_note(goal, by_row) for goal in GOALS if _is_for(goal, some) and by_row),
        *render_slices(measured),
        render_lists(measured),
        render_history(measured),
        *(_lift_table(by_row, result["test"], lifts) for result in baselines if by_row),
        "\n".join(_note(result) for result in results if "against" in result),
        "\n".join(_told_note(result, by_row) for result in results if "told_of_request" in result),
        _unversioned(by_row),
        _settings({name: entries[name] for name in by_row}),
        "\n".join(["```sh", *_commands(results), "```"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _row(seeds: list[Result], knowing: str, entry: Entry) -> str:
    tests = [result["test"][knowing] for result in seeds]
    first, minutes = seeds[0], [result["seconds"] / 60 for result in seeds]
    model = first["recipe"]["model"]
    is_told = knowing == "model"
    best = ", ".join(str(result["best_epoch"]) for result in seeds)
    cells = [
        first["row"],
        _name(entry) if is_told else f"{_name(entry)}; {knowing}",
        f"{model['dim']}/{model['num_layers']}/{model['num_heads']}/{model['max_len']}",
        render_means(tests),
        _goals([entry.floor] if entry.floor else [], tests) if is_told else "",
        _goals(entry.aim, tests) if is_told else "",
        str(len(seeds)),
        f"{best} of {entry.max_epochs}",
        f"{np.mean(minutes):.0f} min, {first['threads']} thread{_precisions(seeds)}",
        entry.published if is_told else "",
    ]
    return f"| {' | '.join(cells)} |"


def _precisions(seeds: list[Result]) -> str:
    """The numbers that trainings counted in, where they were kept."""
    kept = sorted({one["precision"] for one in seeds if "precision" in one})
    return "".join(f", {_SHORT[precision]}" for precision in kept)


def _chosen(baselines: Result, name: str) -> str:
    """The settings of a baseline where they were chosen."""
    settings = baselines.get("settings", {}).get(name, {})
    return ", ".join(f"{setting} {value:g}" for setting, value in settings.items())


def _machines(measured: list[Result]) -> str:
    """Where trainings and baselines ran; the day, which ends the recorded text, is left out."""
    machines = {str(result["machine"]).rpartition(", ")[0] for result in measured}
    return f"Trained and ranked on {'; '.join(sorted(machines))}."


def _is_for(goal: Goal, section: Result) -> bool:
    return (section["dataset"], section["protocol"]) == (goal.dataset, name_protocol(None))


def _goal_note(goal: Goal, by_row: Mapping[str, list[Result]]) -> str:
    """How far the best row of a section is, on all targets and on parts of them."""
    name, seeds = next(iter(by_row.items()))
    tests = {"": [result["test"]["model"] for result in seeds]}
    for part, facts in seeds[0].get("slices", {}).items():
        if facts["num_users"] < seeds[0]["num_users"]:
            of_part = [result["slices"][part]["test"]["model"] for result in seeds]
            tests[f"on the targets with {part} alone "] = of_part
    said = "; ".join(
        f"{where}{' / '.join(f'{_mean_of(runs, metric):.4f}' for metric in METRICS)}, "
        f"floor {_goals([goal.floor], runs)}, aim {_goals([goal.aim], runs)}"
        for where, runs in tests.items()
    )
    return f"Best row {goal.name}: {name}, {said}."


def _goals(goals: Sequence[Pair], tests: list[Result]) -> str:
    """The goals and whether both means over the seeds reach each."""
    means = [_mean_of(tests, metric) for metric in METRICS]
    marks = [
        "✓" if all(ours >= theirs for ours, theirs in zip(means, goal, strict=True)) else "✗"
        for goal in goals
    ]
    return ", then ".join(f"{_pair(goal)} {mark}" for goal, mark in zip(goals, marks, strict=True))


def _pair(goal: Pair | None) -> str:
    return " / ".join(f"{value:.3f}" for value in goal) if goal else ""


def _name(entry: Entry) -> str:
    """The recipe and what it reads beside the items."""
    read = [*entry.context.fields, *entry.attributes.fields]
    return " with ".join([entry.recipe, *([", ".join(read)] if read else [])])


def _mean(seeds: list[Result], metric: str) -> float:
    return _mean_of([result["test"]["model"] for result in seeds], metric)


def _mean_of(tests: list[Result], metric: str) -> float:
    return float(np.mean([test[metric]["mean"] for test in tests]))


def _lift_table(by_row: dict[str, list[Result]], baselines: Result, lifts: Result) -> str:
    """Every trained row over the best collaborative filtering and over the best baseline of all."""
    filtering = _best({name: baselines[name] for name in _COLLABORATIVE if name in baselines})
    best = _best(baselines)
    rivals = [filtering] if best == filtering else [filtering, best]
    cells = [(rival, metric) for rival in rivals for metric in METRICS]
    rows = [
        [name, *(_lift(seeds, *cell, baselines, lifts) for cell in cells)]
        for name, seeds in by_row.items()
    ]
    said = f"Lift over {filtering}, the best collaborative filtering here"
    said += "" if best == filtering else f", and over {best}, the best row without a network"
    head = [f"{metric} over {rival}" for rival, metric in cells]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return f"{said}:\n\n" + render_table(f"| row | {' | '.join(head)} |", lines)


def _best(tests: Result) -> str:
    return max(tests, key=lambda name: float(tests[name]["NDCG@10"]["mean"]))


def _lift(seeds: list[Result], rival: str, metric: str, baselines: Result, lifts: Result) -> str:
    ours, theirs = _mean(seeds, metric), baselines[rival][metric]["mean"]
    lift = lifts.get(seeds[0]["row"], {"over": {}})
    facts = lift["over"].get(rival, {}).get(metric)
    if facts is None or facts["lift"] is None:
        return f"{ours / theirs - 1:+.1%}" if theirs else ""
    return f"{_with_interval(facts)}{_compared_seeds(lift, seeds)}"


def _compared_seeds(comparison: Result, seeds: list[Result]) -> str:
    """Which seeds have ranks, if not all have."""
    compared = comparison["seeds"]
    return "" if len(compared) == len(seeds) else f", seed {', '.join(map(str, compared))}"


def _with_interval(facts: Result) -> str:
    """The lift, or the difference where there is nothing to divide by."""
    if facts["lift"] is None:
        ends = f"[{facts['difference_low']:+.4f}, {facts['difference_high']:+.4f}]"
        return f"{facts['difference']:+.4f} {ends}"
    return f"{facts['lift']:+.1%} [{facts['lift_low']:+.1%}, {facts['lift_high']:+.1%}]"


def _note(result: Result) -> str:
    return f"{result['row']} against {result['against']}, paired by user: {_lifts(result)}."


def _told_note(result: Result, by_row: Mapping[str, list[Result]]) -> str:
    row = result["told_of_request"]
    seeds = _compared_seeds(result, by_row[row])
    return (
        f"{row} told of the request against the same weights not told, paired by user: "
        f"{_lifts(result)}{seeds}."
    )


def _lifts(result: Result) -> str:
    return ", ".join(f"{metric} {_with_interval(result[metric])}" for metric in METRICS)


def _unversioned(by_row: Mapping[str, list[Result]]) -> str:
    """Which trainings do not say what code they ran."""
    seeds = {
        row: [str(result["seed"]) for result in results if not result.get("code_version")]
        for row, results in by_row.items()
    }
    named = [f"{row} {', '.join(found)}" for row, found in sorted(seeds.items()) if found]
    if not named:
        return ""
    return f"Recorded before the version of the code was kept, by seed: {'; '.join(named)}."


def _settings(entries: Mapping[str, Entry]) -> str:
    """What each row replaces in its recipe."""
    if not entries:
        return ""
    lines = []
    for name, entry in sorted(entries.items()):
        changes = ", ".join(f"`{change}`" for change in _changes(entry.overrides))
        lines.append(f"- {name}: `{entry.recipe}`{f' with {changes}' if changes else ' as it is'}")
    return "\n".join(["Settings that replace those of the recipe:", "", *lines])


def _changes(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            yield from _changes(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {json.dumps(value)}"


def _commands(results: list[Result]) -> list[str]:
    commands = []
    for result in results:
        if "seed" in result:
            commands.append(f"train {result['row']} --seed {result['seed']}")
        elif "against" in result:
            compared = f"{result['row']} {result['against']}"
            commands.append(f"compare {compared} --seed {result['seeds']}")
        elif "baselines" in result:
            cut = f" --cut {' '.join(map(str, result['cut']))}" if result["cut"] else ""
            is_last = result.get("cut_target") == "last"
            target = " --cut_target last" if is_last else ""
            untuned = "" if result.get("is_tuned", True) else " --untuned"
            commands.append(f"baselines {result['dataset']}{cut}{target}{untuned}")
    return [f"python -m benchmarks.leaderboard {command}" for command in commands]


def _render_untrained(entries: Mapping[str, Entry]) -> str:
    rows = []
    for name, entry in entries.items():
        goals = _pair(entry.floor), ", then ".join(map(_pair, entry.aim))
        dataset = f"{entry.dataset}, {name_protocol(entry.cut, entry.cut_target)}"
        rows.append(f"| {' | '.join([name, _name(entry), dataset, *goals, entry.published])} |")
    commands = [f"python -m benchmarks.leaderboard train {name} --seed 1" for name in entries]
    parts = [
        "## Not trained yet",
        render_table(_UNTRAINED_HEAD, rows),
        _settings(entries),
        "\n".join(["```sh", *commands, "```"]),
    ]
    return "\n\n".join(parts)

"""The pictures of an evaluation report, as SVG.

The only module that imports matplotlib. It draws on `Figure` objects of its own: there is no
current figure, and no setting of the process stays changed.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Facts = Mapping[str, Any]
"""One entry of evaluation.json or of a run's history."""
Series = Mapping[str, tuple[Mapping[str, Facts], str]]
"""Facts of each part under the name of a row, and its colour."""

_WIDTH = 7.6
"""Inches, of a page."""
_MODEL, _BLIND, _STRONGEST, _BASELINE = "#3674b5", "#9fc0e0", "#8a949d", "#cdd2d7"
_INK, _FAINT, _GRID = "#2b3138", "#69727b", "#e6e9ec"
_ALARM = "#c2553f"
_SIZE = 9
_MAX_SHARES = 20
_FARTHEST = 10.0
"""Thresholds away that a picture shows; further than far is as far."""
_MAX_CHARACTERS = 78
"""Labels of more do not stand side by side below an axis."""

LIST_TITLES = {
    "coverage@10": "coverage",
    "gini@10": "Gini index",
    "novelty@10": "novelty, bits",
    "popularity@10": "popularity",
    "diversity@10": "diversity",
}


def to_svg(figure: Figure) -> bytes:
    """The same bytes for the same picture."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "nextitem"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def draw_training(history: Sequence[Facts], best_epoch: int) -> Figure:
    """Training loss and validation NDCG@10 by epoch; a ring marks the epoch that was kept."""
    figure = Figure(figsize=(_WIDTH, 2.5), layout="constrained")
    loss, validation = figure.subplots(1, 2)
    line: dict[str, Any] = {"color": _MODEL, "linewidth": 1.6, "marker": "o", "markersize": 3}
    loss.plot([one["epoch"] for one in history], [one["loss"] for one in history], **line)

    measured = [one for one in history if not math.isnan(one["ndcg10"])]
    validation.plot([one["epoch"] for one in measured], [one["ndcg10"] for one in measured], **line)
    kept = [one["ndcg10"] for one in measured if one["epoch"] == best_epoch]
    validation.plot([best_epoch] * len(kept), kept, "o", markersize=9, mfc="none", mec=_MODEL)

    for axes, title in ((loss, "Training loss"), (validation, "NDCG@10 on validation")):
        _style(axes, title)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_xlabel("epoch", fontsize=_SIZE, color=_FAINT)
        axes.set_xlim(0.5, history[-1]["epoch"] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def draw_rows(rows: Mapping[str, Facts], strongest: str | None) -> Figure:
    """NDCG@10 and HR@10 of the model and of every baseline, with their 95 % intervals."""
    figure = Figure(figsize=(_WIDTH, 0.7 + 0.27 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, metric in zip(panels, ("NDCG@10", "HR@10"), strict=True):
        found = [facts[metric] for facts in rows.values()]
        _bar_rows(axes, rows, [one["mean"] for one in found], strongest)
        _add_intervals(axes, range(len(found)), found, is_horizontal=True)
        for place, one in enumerate(found):
            _write_value(axes, one["high"], place, f"{one['mean']:.4f}")
        axes.set_xlim(0, 1.3 * max(1e-9, *(one["high"] for one in found)))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        _style(axes, f"{metric}, with 95 % interval")
    return figure


def draw_lists(rows: Mapping[str, Facts], strongest: str | None) -> Figure:
    """What the lists of ten are like, in as many panels as there are figures on them."""
    first = next(iter(rows.values()))
    names = [name for name in LIST_TITLES if name in first]
    figure = Figure(figsize=(_WIDTH, 0.6 + 0.27 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True)
    for axes, name in zip(panels, names, strict=True):
        values = [facts[name] for facts in rows.values()]
        _bar_rows(axes, rows, values, strongest)
        for place, value in enumerate(values):
            _write_value(axes, value, place, f"{value:.1f}" if value > 1 else f"{value:.2f}")
        axes.set_xlim(0, 1.55 * max(1e-9, *values))
        _style(axes, LIST_TITLES[name])
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
    return figure


def draw_slices(
    title: str,
    model: Mapping[str, Facts],
    baseline: Mapping[str, Facts],
    baseline_name: str | None,
    *,
    as_lines: bool = False,
) -> Figure:
    """NDCG@10 of each part of the users, for the model and the strongest baseline.

    Args:
        model: facts of each part, in the order in which they are drawn.
        baseline: the same parts; empty where there was no baseline.
        as_lines: for many parts that follow each other, such as the hours of a day.
    """
    series = {"model": (model, _MODEL)}
    if baseline_name is not None:
        series[baseline_name] = (baseline, _STRONGEST)
    widest = max(len(text) for label in model for text in (label, _users(model[label])))
    if as_lines:
        figure = _draw_lines(series, model)
    elif len(model) * (widest + 2) <= _MAX_CHARACTERS:
        figure = _draw_columns(series, model)
    else:
        figure = _draw_bars(series, model)
    _style(figure.axes[0], title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=2,
        frameon=False,
        fontsize=_SIZE,
        labelcolor=_INK,
        handlelength=1.2,
    )
    return figure


def draw_against(comparisons: Mapping[str, Facts], our_name: str, their_name: str) -> Figure:
    """The difference of two runs in every metric with its interval; hollow where 0 lies within."""
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.24 * len(comparisons)), layout="constrained")
    axes = figure.subplots()
    for place, found in enumerate(comparisons.values()):
        low, mean, high = (found[f"difference{end}"] for end in ("_low", "", "_high"))
        filling = _MODEL if found["is_significant"] else "white"
        axes.plot([low, high], [place, place], color=_MODEL, linewidth=1.4)
        axes.plot([mean], [place], "o", mfc=filling, mec=_MODEL, markersize=5.5)
    axes.axvline(0, color=_FAINT, linewidth=0.8)
    axes.set_yticks(range(len(comparisons)), list(comparisons))
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.08)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    _style(axes, f"{our_name} minus {their_name}, with 95 % interval")
    return figure


def draw_drift(measures: Mapping[str, Facts]) -> Figure:
    """Drift of each measure relative to its threshold; what is beyond 1 is an alarm."""
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.24 * len(measures)), layout="constrained")
    axes = figure.subplots()
    ratios = [_relative(found["drift"], found) for found in measures.values()]
    colours = [_ALARM if found["alarm"] else _MODEL for found in measures.values()]
    places = range(len(measures))
    axes.barh(places, ratios, 0.68, color=colours)
    usual = [_relative(found["usual"], found) for found in measures.values()]
    axes.plot(usual, places, "|", color=_INK, markersize=9)
    axes.axvline(1, color=_INK, linewidth=0.9)
    axes.set_yticks(places, list(measures), parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(1.05 * min(0.0, *ratios), 1.05 * max(1.2, *ratios))
    _style(axes, "Drift relative to its threshold; a tick: usual without drift")
    return figure


def draw_shares(title: str, facts: Facts) -> Figure:
    """The shares of a histogram in both periods, the largest ones."""
    order = sorted(
        range(len(facts["labels"])),
        key=lambda k: -max(facts["reference"][k], facts["current"][k]),
    )
    shown = sorted(order[:_MAX_SHARES])
    figure = Figure(figsize=(_WIDTH, 0.8 + 0.26 * len(shown)), layout="constrained")
    axes = figure.subplots()
    sides = (("reference", _BASELINE, -0.2), ("current", _MODEL, 0.2))
    for side, colour, shift in sides:
        shares = [facts[side][k] for k in shown]
        axes.barh([place + shift for place in range(len(shown))], shares, 0.4, color=colour)
    axes.set_yticks(range(len(shown)), [facts["labels"][k] for k in shown], parse_math=False)
    axes.invert_yaxis()
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    _style(axes, f"{title}: grey in the reference period, blue in the current one")
    return figure


def _relative(drift: float, found: Facts) -> float:
    """Drift in thresholds, within what a picture can show; a threshold may be 0 where the reference
    period has no spread at all.
    """
    ratio = drift / found["threshold"] if found["threshold"] > 0 else 2.0 * found["alarm"]
    return float(min(max(ratio, -_FARTHEST), _FARTHEST))


def _draw_columns(series: Series, model: Mapping[str, Facts]) -> Figure:
    """Upright bars side by side, for a few parts with short names."""
    width = min(_WIDTH, 2.2 + 0.85 * len(model))
    figure = Figure(figsize=(width, 2.7), layout="constrained")
    axes = figure.subplots()
    for places, name, facts, colour in _side_by_side(series):
        means = [one["mean"] for one in facts]
        axes.bar(places, means, 0.8 / len(series), color=colour, label=name)
        _add_intervals(axes, places, facts, is_horizontal=False)
    labels = [f"{label}\n{_users(facts)}" for label, facts in model.items()]
    axes.set_xticks(range(len(model)), labels, parse_math=False)
    axes.set_xlabel("below each label: users", fontsize=_SIZE - 1, color=_FAINT)
    axes.set_ylim(0, _top(series))
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    return figure


def _draw_bars(series: Series, model: Mapping[str, Facts]) -> Figure:
    """Lying bars one below the other, for names of any length."""
    figure = Figure(figsize=(_WIDTH, 1.2 + 0.36 * len(model)), layout="constrained")
    axes = figure.subplots()
    for places, name, facts, colour in _side_by_side(series):
        means = [one["mean"] for one in facts]
        axes.barh(places, means, 0.8 / len(series), color=colour, label=name)
        _add_intervals(axes, places, facts, is_horizontal=True)
    labels = [f"{label} ({_users(facts)})" for label, facts in model.items()]
    axes.set_yticks(range(len(model)), labels, parse_math=False)
    axes.set_xlabel("in parentheses: users", fontsize=_SIZE - 1, color=_FAINT)
    axes.invert_yaxis()
    axes.set_xlim(0, _top(series))
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    return figure


def _draw_lines(series: Series, model: Mapping[str, Facts]) -> Figure:
    """Lines with bands above the number of users, for many parts in an order of their own."""
    figure = Figure(figsize=(_WIDTH, 3.3), layout="constrained")
    gains, users = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    places = range(len(model))
    for name, (parts, colour) in series.items():
        facts = list(parts.values())
        low, high = ([one[end] for one in facts] for end in ("low", "high"))
        gains.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
        means = [one["mean"] for one in facts]
        gains.plot(places, means, "o-", color=colour, markersize=3, linewidth=1.6, label=name)
    gains.set_ylim(0, _top(series))
    gains.grid(axis="y", color=_GRID, linewidth=0.8)

    users.bar(places, [facts["num_users"] for facts in model.values()], 0.7, color=_BASELINE)
    users.set_ylabel("users", fontsize=_SIZE, color=_FAINT)
    users.set_xticks(places, list(model), parse_math=False)
    users.yaxis.set_major_locator(MaxNLocator(2))
    _style(users, "")
    return figure


def _side_by_side(series: Series) -> list[tuple[list[float], str, list[Facts], str]]:
    """Places of the bars, name, facts and colour of each row that is drawn."""
    width = 0.8 / len(series)
    shifts = [width * (number - (len(series) - 1) / 2) for number in range(len(series))]
    return [
        ([place + shift for place in range(len(parts))], name, list(parts.values()), colour)
        for shift, (name, (parts, colour)) in zip(shifts, series.items(), strict=True)
    ]


def _bar_rows(
    axes: Axes, rows: Mapping[str, Facts], values: Sequence[float], strongest: str | None
) -> None:
    """A lying bar for each row of the leader board; the models come first."""
    colours = {"model": _MODEL, "model, time-blind": _BLIND, strongest: _STRONGEST}
    axes.barh(range(len(rows)), values, 0.68, color=[colours.get(name, _BASELINE) for name in rows])
    axes.set_yticks(range(len(rows)), list(rows))
    if not axes.yaxis_inverted():  # panels share it
        axes.invert_yaxis()


def _add_intervals(
    axes: Axes, places: Sequence[float], facts: Sequence[Facts], *, is_horizontal: bool
) -> None:
    ends = [(one["low"], one["high"]) for one in facts]
    style: dict[str, Any] = {"color": _INK, "linewidth": 1.1}
    for place, (low, high) in zip(places, ends, strict=True):
        if is_horizontal:
            axes.plot([low, high], [place, place], **style)
        else:
            axes.plot([place, place], [low, high], **style)


def _write_value(axes: Axes, value: float, place: float, text: str) -> None:
    axes.annotate(
        text,
        (value, place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=_SIZE - 1,
        color=_INK,
    )


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=_SIZE + 0.5, color=_INK, parse_math=False)
    axes.tick_params(labelsize=_SIZE - 0.5, labelcolor=_INK, color=_GRID, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.set_axisbelow(True)


def _top(series: Series) -> float:
    """End of an axis from 0 that holds every interval."""
    highs = [float(one["high"]) for parts, _ in series.values() for one in parts.values()]
    return 1.08 * max(1e-9, *highs)


def _users(facts: Facts) -> str:
    return f"{facts['num_users']:,}"


def draw_objective(points: Sequence[Facts]) -> Figure:
    """Objective of each trial with its standard error over the minutes of a search, and the best so
    far as a line. Hollow: stopped early.

    Args:
        points: `minutes`, `ndcg10`, `error` and `is_stopped` of each, by time.
    """
    figure = Figure(figsize=(_WIDTH, 2.7), layout="constrained")
    axes = figure.subplots()
    best = [max(one["ndcg10"] for one in points[: place + 1]) for place in range(len(points))]
    axes.step([one["minutes"] for one in points], best, where="post", color=_MODEL, linewidth=1.6)
    for one in points:
        low, high = one["ndcg10"] - one["error"], one["ndcg10"] + one["error"]
        axes.plot([one["minutes"]] * 2, [low, high], color=_BASELINE, linewidth=1.1)
        filling = "white" if one["is_stopped"] else _MODEL
        axes.plot(one["minutes"], one["ndcg10"], "o", mfc=filling, mec=_MODEL, markersize=4.5)
    _style(axes, "NDCG@10 of trials on validation, with standard error; line: the best so far")
    axes.set_xlabel("minutes; hollow: stopped early", fontsize=_SIZE, color=_FAINT)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    return figure


def draw_asha(curves: Sequence[Facts]) -> Figure:
    """NDCG@10 of each trial by epoch; a cross where it was stopped, the winner in front.

    Args:
        curves: `epochs`, `ndcg10`, `is_stopped` and `is_winner` of each.
    """
    figure = Figure(figsize=(_WIDTH, 3.3), layout="constrained")
    axes = figure.subplots()
    for one in sorted(curves, key=lambda curve: bool(curve["is_winner"])):
        colour = _MODEL if one["is_winner"] else _STRONGEST
        width = 2.0 if one["is_winner"] else 0.9
        mark = "" if len(one["epochs"]) > 1 else "o"
        axes.plot(one["epochs"], one["ndcg10"], f"-{mark}", color=colour, linewidth=width, ms=3)
        if one["is_stopped"]:
            axes.plot(one["epochs"][-1], one["ndcg10"][-1], "x", color=colour, markersize=5)
    _style(axes, "NDCG@10 on validation by epoch; crosses: stopped early; blue: the best")
    axes.set_xlabel("epoch", fontsize=_SIZE, color=_FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    return figure


def draw_importance(shares: Mapping[str, float]) -> Figure:
    """A lying bar for each parameter."""
    figure = Figure(figsize=(_WIDTH, 0.6 + 0.27 * len(shares)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(shares)), list(shares.values()), 0.68, color=_MODEL)
    axes.set_yticks(range(len(shares)), list(shares), parse_math=False)
    axes.invert_yaxis()
    for place, share in enumerate(shares.values()):
        _write_value(axes, share, place, f"{share:.2f}")
    axes.set_xlim(0, 1.15)
    _style(axes, "Share of the objective's variance that a parameter explains by itself")
    return figure


def draw_parallel(
    trials: Sequence[tuple[Mapping[str, Any], float]], paths: Sequence[str], logarithmic: set[str]
) -> Figure:
    """A line through the values of each trial, one axis a parameter and the objective last; the
    better, the darker. A parameter that takes no part in a trial has its line at the bottom.

    Args:
        trials: values and objective of each.
        logarithmic: paths whose axis is.
    """
    figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    scales = [_scale([one[0].get(path) for one in trials], path in logarithmic) for path in paths]
    objectives = [objective for _, objective in trials]
    scales.append(_scale(objectives, is_logarithmic=False))
    order = sorted(range(len(trials)), key=lambda place: objectives[place])
    for rank, place in enumerate(order):
        share = (rank + 1) / len(order)
        heights = [heights[place] for heights, _ in scales]
        axes.plot(range(len(scales)), heights, color=_MODEL, alpha=0.08 + 0.8 * share**3, lw=1.3)
    for column, (_, marks) in enumerate(scales):
        axes.axvline(column, color=_GRID, linewidth=0.8, zorder=0)
        for height, label in marks:
            axes.annotate(
                label,
                (column, height),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=_SIZE - 2,
                color=_INK,
                parse_math=False,
            )
    names = [path.replace(".", ".\n") for path in paths]
    axes.set_xticks(range(len(scales)), [*names, "NDCG@10"], parse_math=False)
    axes.set_yticks([])
    axes.set_ylim(-0.22, 1.08)
    _style(axes, "Values of each trial; the darker, the better; at the foot: takes no part")
    return figure


def _scale(
    values: Sequence[Any], is_logarithmic: bool
) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights from 0 to 1, those of nothing below, and the labels of an axis."""
    there = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in there):
        numbers = {value: math.log(value) if is_logarithmic else float(value) for value in there}
        low, high = (end(numbers.values(), default=0.0) for end in (min, max))
        places = {value: (one - low) / ((high - low) or 1.0) for value, one in numbers.items()}
        ends = sorted(set(there))
        labels = [(places[one], f"{one:.3g}") for one in {*ends[:1], *ends[-1:]}]
    else:
        kinds = sorted({str(value) for value in there})
        of_kind = {kind: place / max(1, len(kinds) - 1) for place, kind in enumerate(kinds)}
        places = {value: of_kind[str(value)] for value in there}
        labels = [(height, kind) for kind, height in of_kind.items()]
    return [-0.18 if value is None else places[value] for value in values], labels

"""The leader board's rows on parts of the targets, and what their lists are like."""

from collections.abc import Iterator

import numpy as np

from benchmarks.leaderboard_cells import Result, mean_over_seeds, render_means, render_table

_LISTS = {"coverage@10": "{:.1%}", "novelty@10": "{:.2f} bits", "popularity@10": "{:.3f}"}
"""What is shown of the lists, and how."""


def render_slices(measured: list[Result]) -> Iterator[str]:
    """The same rows on parts of the targets that are not all, where the results tell."""
    tested: dict[str, dict[str, list[Result]]] = {}
    num_users: dict[str, int] = {}
    for result in measured:
        for name, part in result.get("slices", {}).items():
            if part["num_users"] == result["num_users"]:
                continue
            num_users[name] = part["num_users"]
            for knowing, test in part["test"].items():
                of_row = _row_name(result, knowing)
                tested.setdefault(name, {}).setdefault(of_row, []).append(test)
    for name, rows in tested.items():
        lines = [f"| {row} | {render_means(tests)} | {len(tests)} |" for row, tests in rows.items()]
        yield (
            f"On the {num_users[name]:,} targets with {name} alone:\n\n"
            + render_table("| row | HR@10 | NDCG@10 | runs |", lines)
        )


def _row_name(result: Result, knowing: str) -> str:
    row: str = result.get("row", knowing)
    return row if knowing in ("model", row) else f"{row}; {knowing}"


def render_lists(measured: list[Result]) -> str:
    """What the lists are like, of the rows whose results tell."""
    rows: dict[str, list[Result]] = {}
    for result in measured:
        for knowing, lists in result.get("lists", {}).items():
            rows.setdefault(_row_name(result, knowing), []).append(lists)
    if not rows:
        return ""
    lines = [f"| {row} | {_list_cells(runs)} | {len(runs)} |" for row, runs in rows.items()]
    return "Beyond accuracy:\n\n" + render_table(f"| row | {' | '.join(_LISTS)} | runs |", lines)


def _list_cells(runs: list[Result]) -> str:
    means = {name: np.mean([run[name] for run in runs]) for name in _LISTS}
    return " | ".join(text.format(means[name]) for name, text in _LISTS.items())


def render_history(measured: list[Result]) -> str:
    """NDCG@10 by events before the target, of the rows whose results tell."""
    parts: dict[str, int] = {}
    rows: dict[str, dict[str, list[Result]]] = {}
    for result in measured:
        for part, facts in result.get("kinds", {}).get("history_length", {}).items():
            parts[part] = facts["num_users"]
            for knowing, test in facts["test"].items():
                of_row = rows.setdefault(_row_name(result, knowing), {})
                of_row.setdefault(part, []).append(test)
    if not rows:
        return ""
    head = " | ".join(f"{part} events ({num_users:,} users)" for part, num_users in parts.items())
    cells = {
        row: [mean_over_seeds(tests[part], "NDCG@10") if part in tests else "" for part in parts]
        for row, tests in rows.items()
    }
    lines = [f"| {row} | {' | '.join(of_row)} |" for row, of_row in cells.items()]
    return "NDCG@10 by history length:\n\n" + render_table(f"| row | {head} |", lines)

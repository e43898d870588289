"""Cells and tables of the leader board."""

from typing import Any

import numpy as np

METRICS = ("HR@10", "NDCG@10")

Result = dict[str, Any]


def render_means(tests: list[Result]) -> str:
    """Means over the seeds, and the spread of the seeds."""
    cells = []
    for metric in METRICS:
        of_seeds = [test[metric]["mean"] for test in tests]
        spread = f" ({min(of_seeds):.4f} to {max(of_seeds):.4f})" if len(tests) > 1 else ""
        cells.append(f"{mean_over_seeds(tests, metric)}{spread}")
    return " | ".join(cells)


def mean_over_seeds(tests: list[Result], metric: str) -> str:
    """The interval is that of the users, averaged."""
    mean = np.mean([test[metric]["mean"] for test in tests])
    half = np.mean([(test[metric]["high"] - test[metric]["low"]) / 2 for test in tests])
    return f"{mean:.4f} ± {half:.4f}"


def render_table(head: str, rows: list[str]) -> str:
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rows])

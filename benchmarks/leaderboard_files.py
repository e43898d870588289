"""Where the leader board keeps what was found: results beside the table, ranks below
`$NEXTITEM_HOME`.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.leaderboard_cells import METRICS
from recsys.leaderboard import Row
from recsys.metrics import mean_accuracy

RESULTS = Path(__file__).parent / "results" / "leaderboard"
MODEL, TIME_BLIND = "model", "time-blind"


def read_results() -> list[dict[str, Any]]:
    """All that trainings, baselines and comparisons found, in the order of their files."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def read_result(name: str) -> dict[str, Any]:
    """One of them. Raises: FileNotFoundError."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def keep(name: str, found: dict[str, Any]) -> None:
    """Writes a result."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def home() -> Path:
    """The folder of checkpoints and ranks."""
    return Path(os.environ.get("NEXTITEM_HOME", Path.home() / "nextitem")) / "leaderboard"


def save_ranks(folder: Path, rows: list[Row]) -> None:
    """A file for each row of a training."""
    for row in rows:
        np.save(_ranks_file(folder, row.name), row.ranking.ranks_N)


def _ranks_file(folder: Path, name: str) -> Path:
    return folder / ("ranks.npy" if name == MODEL else f"ranks-{name}.npy")


def read_model_ranks(result: dict[str, Any], name: str = MODEL) -> np.ndarray | None:
    """int `[N]`; None where they are not on this machine, or are those of another run."""
    if name not in result["test"]:
        return None
    folder = home() / f"{result['row']}-{result['seed']}"
    return _read_ranks(_ranks_file(folder, name), result["test"][name])


def read_baseline_ranks(result: dict[str, Any], name: str) -> np.ndarray | None:
    """As `read_model_ranks`."""
    folder = baselines_folder(result["dataset"], result["protocol"])
    return _read_ranks(folder / f"{name}.npy", result["test"][name])


def _read_ranks(path: Path, test: dict[str, Any]) -> np.ndarray | None:
    if not path.exists():
        return None
    ranks_N: np.ndarray = np.load(path)
    means = mean_accuracy(ranks_N)
    is_same = all(math.isclose(means[metric], test[metric]["mean"]) for metric in METRICS)
    return ranks_N if is_same else None


def section_of(result: dict[str, Any]) -> tuple[str, ...]:
    """What results have in common that can be compared."""
    return tuple(result[key] for key in ("dataset", "protocol", "targets_sha256"))


def baselines_folder(dataset: str, protocol: str) -> Path:
    """Where the ranks of a data set's baselines lie."""
    return home() / f"baselines-{dataset}-{protocol.replace(' ', '-')}"

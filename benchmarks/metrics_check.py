"""Our metrics beside those of ranx and RecTools, on the same rankings.

    python -m benchmarks.metrics_check

Ranks 3,000 users' targets among 2,000 items with `rank_targets`; each peer then takes its own
metrics of the same lists of twenty, user by user, in an environment of its own that is built in a
temporary folder with the versions below. Needs a package index.

Writes `benchmarks/results/metrics.md`; the last line printed is one JSON object with the largest
absolute difference of any user.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.measure import machine
from recsys.catalogue import NUM_SPECIAL
from recsys.evaluation import Ranking, rank_targets
from recsys.metrics import accuracy, list_quality
from recsys.splits import leave_one_out
from recsys.tokens import TokenStore

RESULTS = Path(__file__).parent / "results"
PEERS = {
    "ranx": ("ranx==0.3.21", "numba==0.68.1", "numpy==2.4.6", "pandas==3.1.1", "scipy==1.17.1"),
    "rectools": ("RecTools==0.19.0", "numpy==1.26.4", "pandas==2.3.3", "scipy==1.17.1"),
}
TIMEOUT_S = 600
NUM_USERS, NUM_ITEMS, NUM_EVENTS, NUM_CATEGORIES = 3_000, 2_000, 20, 25


class PlantedScorer:
    """Random scores that favour some items, and the target so far that many come near the top."""

    name = "planted"

    def score(self, store: TokenStore, users_B: np.ndarray, targets_B: np.ndarray) -> Tensor:
        rng = np.random.default_rng([7, int(users_B[0])])
        scores_BI = rng.normal(size=(len(users_B), NUM_SPECIAL + NUM_ITEMS)).astype(np.float32)
        scores_BI += 2 * np.random.default_rng(9).normal(size=NUM_SPECIAL + NUM_ITEMS)
        scores_BI[np.arange(len(users_B)), store.items_T[targets_B]] += rng.uniform(0, 9)
        scores_BI[:, :NUM_SPECIAL] = -np.inf
        return torch.from_numpy(scores_BI)


def main() -> None:
    """Parses; ranks, asks the peers, compares and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rankings = Path(folder) / "rankings.npz"
        ours = rank(rankings)
        theirs = {peer: ask(peer, rankings, Path(folder)) for peer in arguments.peers}
    found = {
        peer: {name: largest_difference(ours[name], values) for name, values in of_peer.items()}
        for peer, of_peer in theirs.items()
    }
    _record(ours, found)
    print(json.dumps({peer: max(differences.values()) for peer, differences in found.items()}))


def rank(rankings: Path) -> dict[str, np.ndarray]:
    """Our metrics: values of each user under a metric at k, one value under a figure of all lists.

    Writes lists, targets, training counts and categories for the peers, items counted from 0.
    """
    store = _draw_store()
    split = leave_one_out(store.offsets_U)
    num_rows = NUM_SPECIAL + NUM_ITEMS
    trained_T = np.delete(store.items_T, np.concatenate([split.validation_U, split.test_U]))
    counts_I = np.bincount(trained_T, minlength=num_rows)
    categories_I = np.random.default_rng(8).integers(0, NUM_CATEGORIES, num_rows)
    ranking = rank_targets(
        PlantedScorer(), store, np.arange(NUM_USERS), split.test_U, top_k=20, batch_size=1
    )
    _check_lists(ranking)
    np.savez(
        rankings,
        lists=ranking.top_NK - NUM_SPECIAL,
        targets=store.items_T[split.test_U] - NUM_SPECIAL,
        counts=counts_I[NUM_SPECIAL:],
        categories=categories_I[NUM_SPECIAL:],
    )
    quality = list_quality(ranking.top_NK, counts_I, categories_I=categories_I)
    return accuracy(ranking.ranks_N) | {name: np.array([v]) for name, v in quality.items()}


def ask(peer: str, rankings: Path, folder: Path) -> dict[str, np.ndarray]:
    """The peer's values of the same metrics, from an environment of its own."""
    home = folder / peer
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, *PEERS[peer]], check=True, timeout=TIMEOUT_S)
    answers = folder / f"{peer}.npz"
    script = Path(__file__).with_name("metrics_peers.py")
    command = [str(python), "-W", "ignore", str(script), peer, str(rankings), str(answers)]
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    return dict(np.load(answers))


def largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Over all users. Raises: ValueError when they are not as many."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{len(ours)} values cannot be compared with {len(theirs)}.")
    return float(np.abs(ours - theirs).max())


def _draw_store() -> TokenStore:
    """Seeded events of distinct items, a few of them often: no target was seen before."""
    rng = np.random.default_rng(7)
    weights = 1 / np.arange(1, NUM_ITEMS + 1)
    items = [
        rng.choice(NUM_ITEMS, NUM_EVENTS, replace=False, p=weights / weights.sum())
        for _ in range(NUM_USERS)
    ]
    items_T = (np.concatenate(items) + NUM_SPECIAL).astype(np.int32)
    return TokenStore(
        pa.array(np.arange(NUM_USERS)),
        np.arange(0, len(items_T) + 1, NUM_EVENTS),
        items_T,
        np.zeros((len(items_T), 0), np.uint8),
        np.arange(len(items_T)),
    )


def _check_lists(ranking: Ranking) -> None:
    assert ranking.top_NK.shape == (NUM_USERS, 20)
    assert (ranking.top_NK >= NUM_SPECIAL).all()


def _record(ours: dict[str, np.ndarray], found: dict[str, dict[str, float]]) -> None:
    rows = []
    for name, values in ours.items():
        cells = [f"{found[peer][name]:.1e}" if name in found[peer] else "" for peer in found]
        rows.append(f"| {name} | {values.mean():.6f} | {' | '.join(cells)} |")
    pins = ", ".join(pin for peer in found for pin in PEERS[peer][:1])
    text = [
        "# Metrics beside other implementations",
        "",
        f"`python -m benchmarks.metrics_check`: {NUM_USERS:,} users' targets among {NUM_ITEMS:,} "
        f"items; {pins}.",
        "The largest absolute difference of any user, or of the one figure of all lists; empty "
        "where the peer has no counterpart.",
        f"{machine()}.",
        "",
        f"| metric | ours, mean | {' | '.join(found)} |",
        f"|---|---|{'---|' * len(found)}",
        *rows,
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "metrics.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    sys.exit(main())

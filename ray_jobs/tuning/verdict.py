"""Whether the winner of a search is better than the recipe that it began with.

Both are trained to the end with several seeds, without scheduler, and rank validation users that
were held out of the search: the best of many trials flatters itself on the users that chose it.
What a training ranked is kept, so that a verdict that was interrupted goes on.
"""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from ray_jobs.tuning.search import Data, num_concurrent
from ray_jobs.tuning.space import Values
from ray_jobs.tuning.training import SearchTask, resources_of, train_here, train_with_ray
from ray_jobs.tuning.trials import Trial
from recsys.comparison import Comparison, compare, compare_seeds
from recsys.evaluation import rank_targets
from recsys.metrics import ndcg
from recsys.precision import choose_dtype
from recsys.scorer import ModelScorer
from recsys.splits import hold_out, split_tokens
from recsys.targets import find_targets
from recsys.tokens import TokenStore

log = logging.getLogger(__name__)

_DEFAULT = "default"


@dataclass(frozen=True)
class Verdict:
    """Winner against default on the users held out."""

    comparison: Comparison
    by_seed: tuple[Comparison, ...]
    winner_ndcg10: tuple[float, ...]
    """Of each seed."""
    default_ndcg10: tuple[float, ...]
    num_users: int

    @property
    def wins(self) -> bool:
        """The 95 % interval of the difference lies above 0."""
        return self.comparison.is_better

    def facts(self) -> dict[str, Any]:
        """As plain values."""
        lift = self.comparison.lift
        return {
            "wins": self.wins,
            "difference": asdict(self.comparison.difference),
            "lift": None if lift is None else asdict(lift),
            "differences_by_seed": [one.difference.mean for one in self.by_seed],
            "winner_ndcg10": list(self.winner_ndcg10),
            "default_ndcg10": list(self.default_ndcg10),
            "num_users": self.num_users,
        }


def judge(winner_ranks_SN: np.ndarray, default_ranks_SN: np.ndarray, *, seed: int) -> Verdict:
    """The verdict on ranks of the same held-out users, a row a seed."""
    pairs = zip(winner_ranks_SN, default_ranks_SN, strict=True)
    return Verdict(
        compare_seeds(winner_ranks_SN, default_ranks_SN, seed=seed),
        tuple(compare(ours_N, theirs_N, seed=seed) for ours_N, theirs_N in pairs),
        tuple(float(ndcg(ranks_N, 10).mean()) for ranks_N in winner_ranks_SN),
        tuple(float(ndcg(ranks_N, 10).mean()) for ranks_N in default_ranks_SN),
        winner_ranks_SN.shape[1],
    )


def confirm(task: SearchTask, data: Data, winner: Trial) -> Verdict:
    """Trains winner and default with each seed and judges them. Raises: TrainingError."""
    name = f"trial-{winner.number}"
    first = task.config.seed
    # Not the seed of the search, by which the winner was chosen.
    seeds = [first + 1 + number for number in range(task.config.tune.confirm_seeds)]
    recipes: dict[str, Values] = {name: winner.values, _DEFAULT: {}}
    wanted = {(who, seed): values for seed in seeds for who, values in recipes.items()}
    ranks = _rank_all(task, data, wanted)
    ours_SN, theirs_SN = (
        np.stack([ranks[who, seed] for seed in seeds]) for who in (name, _DEFAULT)
    )
    return judge(ours_SN, theirs_SN, seed=first)


def _rank_all(
    task: SearchTask, data: Data, wanted: Mapping[tuple[str, int], Values]
) -> dict[tuple[str, int], np.ndarray]:
    folder = task.folder / "verdict"
    folder.mkdir(exist_ok=True)
    ranks: dict[tuple[str, int], np.ndarray] = {}
    missing = []
    for key in wanted:
        path = folder / f"{key[0]}-{key[1]}.npy"
        if path.exists():
            ranks[key] = np.load(path)
        else:
            missing.append(key)
    for key, ranks_N in _train_all(task, data, {key: wanted[key] for key in missing}):
        _save(folder / f"{key[0]}-{key[1]}.npy", ranks_N)
        ranks[key] = ranks_N
        log.info("%s, seed %d: NDCG@10 %.4f held out", *key, ndcg(ranks_N, 10).mean())
    return ranks


def _train_all(task: SearchTask, data: Data, wanted: Mapping[tuple[str, int], Values]) -> Any:
    """Pairs of a key and its ranks, as they come; as many at once as trials were."""
    if not task.config.tune.trains_in_trial:
        for (name, seed), values in wanted.items():
            yield (name, seed), _train_group(task, data, values, seed, name)
        return
    resources = resources_of(task.config)
    train = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), max_retries=3)(
        train_and_rank
    )
    store = ray.put(data.store)
    waiting = list(wanted.items())
    running: dict[Any, tuple[str, int]] = {}
    while waiting or running:
        while waiting and len(running) < num_concurrent(task):
            key, values = waiting.pop(0)
            running[train.remote(task, store, values, key[1])] = key
        (done,), _ = ray.wait(list(running), num_returns=1)
        yield running.pop(done), ray.get(done)


def train_and_rank(task: SearchTask, store: TokenStore, values: Values, seed: int) -> np.ndarray:
    """Trains in this process to the end; ranks of the users held out, int64 `[N]`."""
    torch.set_num_threads(max(1, int(task.config.tune.cpus_per_trial)))
    store = TokenStore.concatenate([store])  # writable, see `search.run_trial_here`
    plan = task.plan(values, seed)
    weights = train_here(plan, store, lambda report: None, keeps_weights=True)
    return rank_held_out(task, store, values, weights)


def rank_held_out(
    task: SearchTask, store: TokenStore, values: Values, weights: Mapping[str, torch.Tensor]
) -> np.ndarray:
    """Rank of the validation target of each user held out, int64 `[N]`."""
    config, vocabulary = task.config, task.vocabulary
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = task.plan(values, config.seed)
    model = vocabulary.make_model(plan.recipe.model)
    model.load_state_dict(dict(weights))
    targets = find_targets(config.train.targets, vocabulary.context)
    split = split_tokens(store, config.split, targets)
    _, users_N = hold_out(split, config.tune.held_out_share)
    scorer = ModelScorer(
        model.to(device),
        vocabulary.context.known_at_request_F,
        dtype=choose_dtype(config.train.trainer.precision, device),
    )
    return rank_targets(
        scorer,
        store,
        users_N,
        split.validation_U[users_N],
        filter_seen=config.evaluate.filter_seen,
    ).ranks_N


def _train_group(task: SearchTask, data: Data, values: Values, seed: int, name: str) -> np.ndarray:
    plan, run = task.plan(values, seed), f"{name}-{seed}-{time.time_ns()}"
    weights = train_with_ray(plan, data.tokens, task.folder / "ray" / "train", run, [])
    return rank_held_out(task, data.store, values, weights)


def _save(path: Path, ranks_N: np.ndarray) -> None:
    """At once: a file that is there is whole."""
    temporary = path.with_name(f".{path.stem}-{os.getpid()}.npy")
    np.save(temporary, ranks_N)
    os.replace(temporary, path)

"""Ranks the whole catalogue for the test users of a run, with the model and with every baseline.

    python -m ray_jobs.evaluate --config synthetic --set evaluate.max_users=5000

Writes `evaluation.json` (metrics, paired comparisons, slices, and a table to read) and
`ranks.parquet` (each target's rank under each row) into the run folder.
"""

import json
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from ray.exceptions import RayTaskError

from ray_jobs.config import PipelineConfig
from ray_jobs.errors import ConfigError, JobError
from ray_jobs.job import Report, main
from ray_jobs.runs import FinishedRun, open_run
from ray_jobs.sequences_reader import collect_tokens, load_tokens, open_sequences
from recsys.baselines import BASELINES, EASE, make_baselines
from recsys.interactions import training_counts
from recsys.leaderboard import (
    HEADLINE,
    Row,
    compare_rows,
    comparison_facts,
    hash_targets,
    measure,
    ranks_table,
    render,
)
from recsys.scorer import ModelScorer
from recsys.slices import slice_labels, slice_ndcg
from recsys.splits import Split, SplitConfig, split_tokens
from recsys.targets import TargetEvents
from recsys.tokens import TokenStore

log = logging.getLogger(__name__)

MODEL = "model"
TIME_BLIND = "model, time-blind"


@dataclass(frozen=True)
class Targets:
    """What is ranked: N test events and what may be learned before them."""

    store: TokenStore
    split: Split
    users_N: np.ndarray
    targets_N: np.ndarray
    counts_I: np.ndarray
    """Training events of each catalogue row."""


def run(config: PipelineConfig) -> Report:
    """Evaluates a finished run. Raises: JobError, ConfigError, TableError, ArtifactError."""
    unknown = sorted(set(config.evaluate.baselines) - set(BASELINES))
    if unknown:
        raise ConfigError(
            f"evaluate.baselines: there is no {', '.join(unknown)}; choose of: "
            f"{', '.join(BASELINES)}."
        )
    finished = open_run(config, config.evaluate.run)
    sequences = open_sequences(config, finished.facts["sequences_version"])
    tokens = load_tokens(sequences, config, finished.vocabulary)

    num_cpus, num_gpus = _largest_worker()
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(evaluate_run)
    try:
        evaluation, ranks = ray.get(task.remote(config, finished, tokens, num_cpus))
    except RayTaskError as error:
        # The worker's own error: one sentence, without the worker's traceback in it.
        raise error.cause from error
    pq.write_table(ranks, finished.folder / "ranks.parquet")
    (finished.folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1))
    return _report(finished, evaluation)


def evaluate_run(
    config: PipelineConfig, finished: FinishedRun, tokens: ray.data.Dataset, num_threads: int
) -> tuple[dict[str, Any], pa.Table]:
    """The content of evaluation.json and of ranks.parquet; runs on one worker.

    Raises: JobError when no user has a test event.
    """
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    torch.set_num_threads(num_threads)
    context = finished.vocabulary.context
    catalogue = finished.vocabulary.catalogue
    # The split that the model was trained with: another one could test on what it has seen.
    split = SplitConfig.model_validate(finished.facts["config"]["split"])
    store = collect_tokens(tokens, len(context.fields))
    targets = choose_targets(store, split, catalogue.num_rows, config, finished.targets)

    names, skipped = _fitting_baselines(config.evaluate.baselines, catalogue.num_items)
    models = _measure_models(finished, targets, config)
    baselines = _measure_baselines(names, targets, config)
    comparisons = compare_rows(models[0], baselines, seed=config.seed)
    blind = compare_rows(models[1], baselines, seed=config.seed)
    rows = [*models, *baselines]

    where = targets.users_N, targets.targets_N
    labels = slice_labels(store, *where, targets.counts_I, context)
    evaluation = {
        "run": finished.folder.name,
        "protocol": split.model_dump(mode="json"),
        "target_event_types": list(finished.targets_config.event_types),
        "filter_seen": config.evaluate.filter_seen,
        "sequences_version": finished.facts["sequences_version"],
        "seed": config.seed,
        "num_users": len(targets.users_N),
        "num_test_users": int((targets.split.test_U >= 0).sum()),
        "num_items": catalogue.num_items,
        "targets_sha256": hash_targets(store, *where, catalogue),
        "rows": {row.name: row.facts() for row in rows},
        "comparisons": {name: comparison_facts(found) for name, found in comparisons.items()},
        "comparisons_time_blind": {name: comparison_facts(found) for name, found in blind.items()},
        "skipped_baselines": skipped,
        "slices": slice_ndcg(models[0].ranking.ranks_N, labels, seed=config.seed),
    }
    table = f"{_caption(evaluation)}\n\n{render(rows, comparisons)}"
    return evaluation | {"table": table}, ranks_table(store, *where, catalogue, rows)


def choose_targets(
    store: TokenStore,
    split_config: SplitConfig,
    num_rows: int,
    config: PipelineConfig,
    target_events: TargetEvents | None = None,
) -> Targets:
    """The test events of all users, or of a seeded sample of `evaluate.max_users`.

    Raises: JobError when there is none.
    """
    split = split_tokens(store, split_config, target_events)
    users = np.flatnonzero(split.test_U >= 0)
    if len(users) == 0:
        raise JobError(
            f"No user has a test event under the {split_config.kind} split; users need three "
            "events, or events on both sides of test_from."
        )
    if len(users) > config.evaluate.max_users:
        generator = np.random.default_rng(config.seed)
        users = np.sort(generator.choice(users, config.evaluate.max_users, replace=False))
    return Targets(
        store, split, users, split.test_U[users], training_counts(store, split, num_rows)
    )


def _measure_models(finished: FinishedRun, targets: Targets, config: PipelineConfig) -> list[Row]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = finished.load_model().materialised().to(device)
    known_F = finished.vocabulary.context.known_at_request_F
    scorers = (
        ModelScorer(model, known_F, name=MODEL),
        ModelScorer(model, known_F, name=TIME_BLIND, knows_request=False),
    )
    return [_measure(scorer, targets, config) for scorer in scorers]


def _measure_baselines(
    names: tuple[str, ...], targets: Targets, config: PipelineConfig
) -> list[Row]:
    baselines = make_baselines(names, recent_days=config.evaluate.recent_days, seed=config.seed)
    num_rows = len(targets.counts_I)
    return [
        _measure(baseline.fit(targets.store, targets.split, num_rows), targets, config)
        for baseline in baselines
    ]


def _measure(scorer: Any, targets: Targets, config: PipelineConfig) -> Row:
    row = measure(
        scorer,
        targets.store,
        targets.users_N,
        targets.targets_N,
        targets.counts_I,
        filter_seen=config.evaluate.filter_seen,
        seed=config.seed,
    )
    log.info("%s: %s %s in %.1f s", row.name, HEADLINE, row.accuracy[HEADLINE], row.seconds)
    return row


def _fitting_baselines(
    names: tuple[str, ...], num_items: int
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The baselines that a catalogue of this size allows, and why others are left out."""
    if "ease" not in names or num_items <= EASE.max_items:
        return names, {}
    reason = f"{num_items:,} items; it stops at {EASE.max_items:,}"
    log.info("ease is left out: %s", reason)
    return tuple(name for name in names if name != "ease"), {"ease": reason}


def _largest_worker() -> tuple[int, int]:
    """CPUs and GPUs that one task can have now, on the largest node; at least one CPU."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    has_gpu = ray.available_resources().get("GPU", 0) >= 1
    suited = [node for node in nodes if node.get("GPU", 0) >= 1] if has_gpu else nodes
    largest = max(node.get("CPU", 0) for node in suited)
    free = ray.available_resources().get("CPU", 0)
    return max(1, int(min(largest, free))), int(has_gpu)


def _caption(evaluation: dict[str, Any]) -> str:
    seen = "left out" if evaluation["filter_seen"] else "kept"
    return (
        f"{evaluation['run']}: {evaluation['protocol']['kind']}, "
        f"{evaluation['num_users']:,} users, {evaluation['num_items']:,} items,\n"
        f"full ranking, seen items {seen}; * marks a lift in NDCG@10 that is beyond noise."
    )


def _report(finished: FinishedRun, evaluation: dict[str, Any]) -> Report:
    rows, comparisons = evaluation["rows"], evaluation["comparisons"]
    figures: dict[str, Any] = {
        "run": finished.folder.name,
        "users": evaluation["num_users"],
        "hr10": rows[MODEL]["HR@10"]["mean"],
        "ndcg10": rows[MODEL][HEADLINE]["mean"],
        "ndcg10_time_blind": rows[TIME_BLIND][HEADLINE]["mean"],
        "beats_all_baselines": all(found["difference"] > 0 for found in comparisons.values()),
        "beats_all_beyond_noise": all(
            found["difference_low"] > 0 for found in comparisons.values()
        ),
        "path": str(finished.folder / "evaluation.json"),
    }
    headline = f"NDCG@10 {figures['ndcg10']:.4f} on {figures['users']:,} test users"
    if comparisons:
        best = max(comparisons, key=lambda name: rows[name][HEADLINE]["mean"])
        figures["best_baseline"] = best
        figures["best_baseline_ndcg10"] = rows[best][HEADLINE]["mean"]
        headline += f", {comparisons[best]['difference']:+.4f} against {best}"
    return Report("evaluate", headline, figures)


if __name__ == "__main__":
    main(run, job="evaluate")

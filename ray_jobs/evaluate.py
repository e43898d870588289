"""Ranks the whole catalogue for the test users of a run, with the model and with every baseline.

    python -m ray_jobs.evaluate --config synthetic --set evaluate.max_users=5000

Writes `evaluation.json` (metrics, paired comparisons, slices, and a table to read),
`ranks.parquet` (each target's rank under each row) and the report (`report.html`, `report.md`,
`plots/`) into the run folder. `evaluate.against` names another run to compare with, user by user.
"""

import json
import logging
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from ray.exceptions import RayTaskError

from ray_jobs.build_sequences import read_stamp
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import ConfigError, JobError
from ray_jobs.job import Report, main
from ray_jobs.report import describe_cut_target, describe_dates, write_report
from ray_jobs.runs import FinishedRun, open_run
from ray_jobs.sequences_reader import collect_tokens, load_tokens, open_sequences, widen_context
from ray_jobs.targets import Targets, choose_targets
from recsys.baseline_search import GRIDS, Settings, Trial, choose_settings, try_settings
from recsys.baselines import BASELINES, EASE, Covisitation, make_baselines
from recsys.comparison import find_target_difference
from recsys.context import ContextEncoder
from recsys.leaderboard import (
    HEADLINE,
    Row,
    category_codes,
    compare_rows,
    compare_runs,
    comparison_facts,
    hash_targets,
    measure,
    render,
)
from recsys.scorer import ModelScorer
from recsys.slices import slice_ndcg, slice_targets
from recsys.splits import SplitConfig
from recsys.validation import sample_users

log = logging.getLogger(__name__)

MODEL = "model"
TIME_BLIND = "model, time-blind"
_TUNING_TARGETS = 5_000
"""At most so many users are validated for each of a baseline's settings."""


@dataclass(frozen=True)
class Rival:
    """An evaluated run that another one is compared with."""

    name: str
    recipe: str
    evaluation: dict[str, Any]
    ranks: pa.Table


def run(config: PipelineConfig) -> Report:
    """Evaluates a finished run. Raises: JobError, ConfigError, TableError, ArtifactError."""
    for key, known in (("baselines", BASELINES), ("tuned", GRIDS)):
        unknown = sorted(set(getattr(config.evaluate, key)) - set(known))
        if unknown:
            raise ConfigError(
                f"evaluate.{key}: there is no {', '.join(unknown)}; choose of: {', '.join(known)}."
            )
    finished = open_run(config, config.evaluate.run)
    rival = open_rival(config)
    sequences = open_sequences(config, finished.facts["sequences_version"])
    sliced = widen_context(sequences, config, finished.vocabulary.context, config.evaluate.slices)
    tokens = load_tokens(sequences, config, replace(finished.vocabulary, context=sliced))

    num_cpus, num_gpus = _largest_worker()
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(evaluate_run)
    try:
        evaluation, ranks = ray.get(task.remote(config, finished, tokens, num_cpus, rival, sliced))
    except RayTaskError as error:
        # The worker's own error: one sentence, without the worker's traceback in it.
        raise error.cause from error
    evaluation |= {
        "sequences_from": read_stamp(sequences),
        "command": describe_command(sys.orig_argv),
        "evaluated_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    pq.write_table(ranks, finished.folder / "ranks.parquet")
    (finished.folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1))
    write_report(finished.folder, evaluation, finished.facts)
    return _report(finished, evaluation)


def evaluate_run(
    config: PipelineConfig,
    finished: FinishedRun,
    tokens: ray.data.Dataset,
    num_threads: int,
    rival: Rival | None = None,
    sliced: ContextEncoder | None = None,
) -> tuple[dict[str, Any], pa.Table]:
    """The content of evaluation.json and of ranks.parquet; runs on one worker.

    `sliced` has encoded the tokens: the run's own fields, which is what None stands for, and others
    that targets are sliced by.
    Raises: JobError when no user has a test event, or when the rival ranked other targets.
    """
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    torch.set_num_threads(num_threads)
    catalogue = finished.vocabulary.catalogue
    # The split that the model was trained with: another one could test on what it has seen.
    split = SplitConfig.model_validate(finished.facts["config"]["split"])
    sliced = sliced or finished.vocabulary.context
    wide = collect_tokens(tokens, len(sliced.fields))
    read_F = [sliced.fields.index(name) for name in finished.vocabulary.context.fields]
    store = replace(wide, context_TF=wide.context_TF[:, read_F])
    targets = choose_targets(store, split, catalogue, config, finished.targets)
    protocol = _describe_protocol(finished, split, targets, config)
    if rival is not None:
        _refuse_other_targets(protocol, targets, rival)

    names, skipped = _fitting_baselines(config.evaluate.baselines, catalogue.num_items)
    models = _measure_models(finished, targets, config)
    trials = _tune_baselines(names, targets, config)
    settings = {name: choose_settings(found) for name, found in trials.items()}
    baselines = _measure_baselines(names, settings, targets, config)
    rows = (*models, *baselines)
    comparisons = compare_rows(models[0], baselines, seed=config.seed)
    blind = compare_rows(models[1], baselines, seed=config.seed)
    ranks = targets.ranks(rows)

    evaluation = {
        **protocol,
        "rows": {row.name: row.facts() for row in rows},
        "comparisons": {name: comparison_facts(found) for name, found in comparisons.items()},
        "comparisons_time_blind": {name: comparison_facts(found) for name, found in blind.items()},
        "skipped_baselines": skipped,
        "baseline_settings": settings,
        "baseline_trials": {
            name: [trial._asdict() for trial in found] for name, found in trials.items()
        },
        **_slice(models[0], baselines, replace(targets, store=wide), sliced, config.seed),
        "against": None if rival is None else _compare_with(rival, ranks, config.seed),
    }
    table = f"{_caption(evaluation)}\n\n{render(rows, comparisons)}"
    return evaluation | {"table": table}, ranks


def open_rival(config: PipelineConfig) -> Rival | None:
    """The run `evaluate.against`, None where there is none.

    Raises: JobError when it does not exist or was not evaluated.
    """
    if config.evaluate.against is None:
        return None
    found = open_run(config, config.evaluate.against)
    recipe = found.facts["recipe"]["name"]
    return Rival(found.folder.name, recipe, found.evaluation(), found.ranks())


def describe_command(argv: Sequence[str]) -> str:
    """The command of this process as it can be given again, without what may be a secret."""
    secret = re.compile(r"((?:^|=)storage(?:\.options[^=]*)?=).*", re.DOTALL)
    return shlex.join(["python", *(secret.sub(r"\1***", argument) for argument in argv[1:])])


def _describe_protocol(
    finished: FinishedRun, split: SplitConfig, targets: Targets, config: PipelineConfig
) -> dict[str, Any]:
    """What must be known to repeat the evaluation, and what two of them must share."""
    return {
        "run": finished.folder.name,
        "recipe": finished.facts["recipe"]["name"],
        "protocol": split.model_dump(mode="json"),
        "target_event_types": list(finished.targets_config.event_types),
        "filter_seen": config.evaluate.filter_seen,
        "sequences_version": finished.facts["sequences_version"],
        "items_version": finished.facts.get("items_version"),
        "seed": config.seed,
        "timezone": finished.vocabulary.context.config.timezone,
        "num_users": len(targets.users_N),
        "num_test_users": int((targets.split.test_U >= 0).sum()),
        "num_items": targets.catalogue.num_items,
        "targets_sha256": hash_targets(*targets.where, targets.catalogue),
    }


def _refuse_other_targets(protocol: dict[str, Any], targets: Targets, rival: Rival) -> None:
    theirs = rival.evaluation
    differences = [
        f"{name} is {protocol[name]} against {theirs[name]}"
        for name in ("num_items", "filter_seen", "target_event_types")
        if protocol[name] != theirs.get(name, [])
    ]
    other_targets = find_target_difference(targets.ranks(), rival.ranks)
    if other_targets is not None:
        differences.append(other_targets)
    if differences:
        raise JobError(
            f"The run {protocol['run']} cannot be compared with {rival.name}: "
            f"{' and '.join(differences)}; evaluate both on the same sequences, with the same "
            "split, seed, evaluate.max_users and evaluate.filter_seen."
        )


def _compare_with(rival: Rival, ranks: pa.Table, seed: int) -> dict[str, Any]:
    """Difference and lift of both rows of the model against the same rows of the rival."""
    found = compare_runs(ranks, rival.ranks, (MODEL, TIME_BLIND), seed=seed)
    return {
        "run": rival.name,
        "recipe": rival.recipe,
        "rows": {
            name: {metric: comparison_facts(one) for metric, one in comparisons.items()}
            for name, comparisons in found.items()
        },
    }


def _slice(
    model: Row, baselines: list[Row], targets: Targets, context: ContextEncoder, seed: int
) -> dict[str, Any]:
    """NDCG@10 of each kind of target, under the model and under the strongest baseline."""
    slicings = slice_targets(*targets.where, targets.counts_I, context)
    strongest = max(baselines, key=lambda row: row.accuracy[HEADLINE].mean, default=None)
    return {
        "slices": slice_ndcg(model.ranking.ranks_N, slicings, seed=seed),
        "strongest_baseline": None if strongest is None else strongest.name,
        "baseline_slices": {}
        if strongest is None
        else slice_ndcg(strongest.ranking.ranks_N, slicings, seed=seed),
    }


def _measure_models(finished: FinishedRun, targets: Targets, config: PipelineConfig) -> list[Row]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = finished.load_model().materialised().to(device)
    known_F = finished.vocabulary.context.known_at_request_F
    scorers = (
        ModelScorer(model, known_F, name=MODEL),
        ModelScorer(model, known_F, name=TIME_BLIND, knows_request=False),
    )
    return [_measure(scorer, targets, config) for scorer in scorers]


def _tune_baselines(
    names: tuple[str, ...], targets: Targets, config: PipelineConfig
) -> dict[str, list[Trial]]:
    """What was tried on validation targets, by the baseline's name: of those that are compared, and
    of co-visitation anyway, which a published version falls back on.
    """
    users = sample_users(targets.split.validation_U, _TUNING_TARGETS, config.seed)
    data = targets.store, targets.split, targets.catalogue.num_rows
    tried = {
        name: try_settings(
            name,
            *data,
            users,
            max_training_users=config.evaluate.tuning_users,
            filter_seen=config.evaluate.filter_seen,
            seed=config.seed,
        )
        for name in config.evaluate.tuned
        if name in (*names, Covisitation.name)
    }
    return {name: found for name, found in tried.items() if found}


def _measure_baselines(
    names: tuple[str, ...],
    settings: Mapping[str, Settings],
    targets: Targets,
    config: PipelineConfig,
) -> list[Row]:
    recent_days, seed = config.evaluate.recent_days, config.seed
    baselines = make_baselines(names, recent_days=recent_days, seed=seed, settings=settings)
    num_rows = targets.catalogue.num_rows
    return [
        _measure(baseline.fit(targets.store, targets.split, num_rows), targets, config)
        for baseline in baselines
    ]


def _measure(scorer: Any, targets: Targets, config: PipelineConfig) -> Row:
    row = measure(
        scorer,
        *targets.where,
        targets.counts_I,
        filter_seen=config.evaluate.filter_seen,
        seed=config.seed,
        categories_I=category_codes(targets.catalogue),
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
    protocol = evaluation["protocol"]
    cut = ""
    if protocol["kind"] == "temporal-cut":
        cut = f"{describe_dates(protocol)},\n{describe_cut_target(protocol)},\n"
    types = ", ".join(evaluation["target_event_types"])
    return (
        f"{evaluation['run']}: {protocol['kind']}, "
        f"{evaluation['num_users']:,} users, {evaluation['num_items']:,} items,"
        f"{f' targets of type {types},' if types else ''}\n"
        f"{cut}full ranking, seen items {seen}; * marks a lift in NDCG@10 that is beyond noise."
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
        "report": str(finished.folder / "report.html"),
    }
    headline = f"NDCG@10 {figures['ndcg10']:.4f} on {figures['users']:,} test users"
    if comparisons:
        best = max(comparisons, key=lambda name: rows[name][HEADLINE]["mean"])
        figures["best_baseline"] = best
        figures["best_baseline_ndcg10"] = rows[best][HEADLINE]["mean"]
        headline += f", {comparisons[best]['difference']:+.4f} against {best}"
    if evaluation["against"]:
        found = evaluation["against"]["rows"][MODEL][HEADLINE]
        figures["against"] = evaluation["against"]["run"]
        figures |= {key: found[key] for key in ("difference", "difference_low", "difference_high")}
    return Report("evaluate", headline, figures)


if __name__ == "__main__":
    main(run, job="evaluate")

"""Searches a better recipe: trials on the cluster, and a verdict on the best of them.

    python -m ray_jobs.tune --config my-shop.toml --set tune.max_trials=40 --set tune.name=first

The file says in `[tune.space]` what may be tried, see `ray_jobs/tuning/space.py`. The folder
`<storage root>/tunes/<name>/` then holds `best.toml`, which `python -m ray_jobs.train --config`
takes as it is, `trials.parquet`, `report.html`, and TensorBoard's files in `ray/`. A search that
was killed goes on when it is started with its name again; trials that ended are not trained again.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from ray_jobs.config import PipelineConfig
from ray_jobs.errors import ConfigError, JobError
from ray_jobs.job import Report, main
from ray_jobs.job_metrics import JobMetrics
from ray_jobs.locks import held
from ray_jobs.sections.storage import expand
from ray_jobs.sequences_reader import (
    collect_tokens,
    learn_vocabulary,
    load_tokens,
    open_sequences,
)
from ray_jobs.tuning.llm import ChatEndpoint, LanguageModelSearch
from ray_jobs.tuning.outcome import Outcome, write_outcome
from ray_jobs.tuning.search import Data, search
from ray_jobs.tuning.searchers import GridSearch, RandomSearch, Searcher, TpeSearch
from ray_jobs.tuning.space import Space, Values, as_overrides
from ray_jobs.tuning.training import SearchTask, max_epochs_of
from ray_jobs.tuning.trials import TrialLog, best_trial
from ray_jobs.tuning.verdict import confirm
from recsys.recipe import Recipe, read_recipe

log = logging.getLogger(__name__)

_RECORD = "search.json"
_MAX_CHECKED = 2_000


def run(config: PipelineConfig) -> Report:
    """Searches, judges and writes.

    Raises: JobError, when another process runs this search, among others; ConfigError, TableError,
        TrainingError.
    """
    space = read_space(config)
    searcher = make_searcher(config, space)
    folder = _search_folder(config)
    with held(folder / ".lock", "search of this name", folder.name):
        return _run(config, space, searcher, folder)


def _run(config: PipelineConfig, space: Space, searcher: Searcher, folder: Path) -> Report:
    started = time.perf_counter()
    task, data = _open(config, folder)
    trials = search(
        task, data, searcher, TrialLog(folder / "trials.jsonl"), first=default_values(config, space)
    )
    searched_s = time.perf_counter() - started
    winner = best_trial(trials)
    is_default = winner is None or winner.origin == "default"
    verdict = None if winner is None or is_default else confirm(task, data, winner)
    outcome = Outcome(folder.name, config, trials, task.max_epochs, verdict)
    write_outcome(folder, outcome)
    _publish(config, outcome)
    return _report(folder, outcome, searched_s, time.perf_counter() - started)


def _open(config: PipelineConfig, folder: Path) -> tuple[SearchTask, Data]:
    """What all trials share, from the tables as they were when the search began."""
    began_with = _read_record(folder)
    sequences = open_sequences(config, began_with.get("sequences_version"))
    learned = learn_vocabulary(sequences, config, None, began_with.get("items_version"))
    _keep_record(
        folder,
        began_with,
        {
            "sequences_version": sequences.version(),
            "items_version": learned.items_version,
            **_what_must_stay(config),
        },
    )
    tokens = load_tokens(sequences, config, learned.vocabulary)
    store = collect_tokens(tokens, len(learned.vocabulary.context.fields))
    return SearchTask(config, learned.vocabulary, folder), Data(store, tokens)


def preview(config: PipelineConfig) -> dict[str, Any]:
    """What a dry run tells: that every combination of the space is a recipe. Raises as `run`."""
    space = read_space(config)
    make_searcher(config, space)
    return {"space": list(space.parameters), "max_epochs": max_epochs_of(config)}


def read_space(config: PipelineConfig) -> Space:
    """The space of a configuration.

    Raises: ConfigError when it is empty, or holds a combination that is no recipe.
    """
    if not config.tune.space:
        raise ConfigError(
            "tune.space is empty, so there is nothing to search; add a parameter, e.g. "
            '[tune.space."optimiser.learning_rate"] kind = "log-uniform" low = 1e-4 high = 1e-2.'
        )
    if config.train.start is not None:
        raise ConfigError("A search begins with random weights; leave train.start out.")
    space, recipe = Space.of(config.tune.space), config.train.recipe
    for values in islice(space.ends(), _MAX_CHECKED):
        try:
            read_recipe(recipe, as_overrides(values, recipe, config.train.overrides))
        except ValueError as error:
            raise ConfigError(
                f"tune.space holds {values}, which is no recipe: {_reason(error)}; take it out of "
                "the space, or make one parameter depend on the other with `when`."
            ) from None
    return space


def make_searcher(config: PipelineConfig, space: Space) -> Searcher:
    """Who proposes. Raises: ConfigError when a language model is asked for and not configured."""
    tune = config.tune
    tpe = TpeSearch(space, config.seed, tune.random_trials)
    if tune.searcher == "random":
        return RandomSearch(space, config.seed)
    if tune.searcher == "grid":
        return GridSearch(space, tune.grid_points)
    if tune.searcher == "llm":
        endpoint = ChatEndpoint.from_environment(tune.llm_timeout_s)
        return LanguageModelSearch(space, endpoint.ask, tpe)
    return tpe


def default_values(config: PipelineConfig, space: Space) -> Values | None:
    """The recipe as it is, in terms of the space; None where it lies outside, or for a grid."""
    if config.tune.searcher == "grid":
        return None
    recipe = read_recipe(config.train.recipe, config.train.overrides)
    values = space.build(lambda path, _: _value_at(recipe, path))
    try:
        return space.check(values)
    except ValueError:
        log.info("The default recipe lies outside of tune.space and is no trial of the search.")
        return None


def _value_at(recipe: Recipe, path: str) -> Any:
    found: Any = recipe
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _search_folder(config: PipelineConfig) -> Path:
    root = expand(config.storage.root)
    if "://" in root:
        raise JobError(f"Searches are written to a folder, not to {root}; set storage.root to one.")
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = Path(root) / "tunes" / (config.tune.name or f"{config.train.recipe}-{now}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _what_must_stay(config: PipelineConfig) -> dict[str, Any]:
    """Without which trials from before would not be comparable."""
    dumped = config.model_dump(mode="json")
    tune, train = dumped["tune"], dumped["train"]
    return {
        "seed": config.seed,
        "max_epochs": max_epochs_of(config),
        **{f"tune.{key}": tune[key] for key in ("space", "held_out_share")},
        **{
            f"train.{key}": train[key]
            for key in ("recipe", "overrides", "context", "targets", "attributes")
        },
        "trainer": {
            key: value
            for key, value in train["trainer"].items()
            if key not in ("max_epochs", "max_minutes")
        },
        "split": dumped["split"],
        "filter_seen": config.evaluate.filter_seen,
    }


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / _RECORD
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record


def _keep_record(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises: JobError when the search of that name began otherwise."""
    changed = sorted(key for key in before if before[key] != now.get(key))
    if changed:
        raise JobError(
            f"The search {folder.name!r} began with another {', '.join(changed)}; configure the "
            "same, or give tune.name another value."
        )
    temporary = folder / f".{_RECORD}-{os.getpid()}"
    temporary.write_text(json.dumps(now, indent=1))
    os.replace(temporary, folder / _RECORD)


def _reason(error: ValueError) -> str:
    """The first sentence of what pydantic found, or the message itself."""
    errors = getattr(error, "errors", None)
    return str(errors()[0]["msg"]).removeprefix("Value error, ") if errors else str(error)


def _publish(config: PipelineConfig, outcome: Outcome) -> None:
    metrics = JobMetrics("tune", config)
    failed = ("failed", "out-of-memory", "lost")
    metrics.set("nextitem_tune_trials_count", len(outcome.trials), "Trials of the last search.")
    metrics.set(
        "nextitem_tune_failed_trials_count",
        sum(map(outcome.num_ended, failed)),
        "Trials of the last search that failed.",
    )
    if outcome.verdict is not None:
        metrics.set(
            "nextitem_tune_gain_ndcg10",
            outcome.verdict.comparison.difference.mean,
            "NDCG@10 of the winner minus the default's, on users held out.",
        )
    metrics.publish()


def _report(folder: Path, outcome: Outcome, searched_s: float, seconds: float) -> Report:
    winner, verdict = outcome.winner, outcome.verdict
    figures: dict[str, Any] = {
        "search": outcome.name,
        "trials": len(outcome.trials),
        "stopped_early": outcome.num_ended("stopped"),
        "failed": sum(map(outcome.num_ended, ("failed", "out-of-memory", "lost"))),
        "best_trial": None if winner is None else winner.number,
        "best_validation_ndcg10": None if winner is None else winner.objective,
        "beats_default": verdict is not None and verdict.wins,
    }
    if verdict is not None:
        figures["gain_ndcg10"] = verdict.comparison.difference.mean
    if outcome.config.tune.searcher == "llm":
        figures["language_model_not_followed"] = outcome.num_fallbacks
    figures |= {
        "search_seconds": searched_s,
        "seconds": seconds,
        "report": str(folder / "report.html"),
    }
    if winner is not None:
        figures["config"] = str(folder / "best.toml")
    return Report("tune", outcome.headline(), figures)


if __name__ == "__main__":
    main(run, job="tune", preview=preview)

"""The weekly loop in one job: new events, sequences, a challenger, and the gates that keep a broken
week or a worse model from visitors.

    python -m ray_jobs.retrain --config synthetic --set train.start.artifact=serving

Data gates come before training; then the challenger must beat the champion on the same held-out
users, its export must agree with it, and it must not be slower. What passes all of them is
published and given `retrain.canary_share` of the visitors; `ray_jobs.canary` gives it the others,
or takes it back. At the first closed gate the job stops: the champion serves on. `--dry-run` shows
the plan.

A job that was killed goes on after its last finished step when it is started with its name again;
a second one at the same time is refused. `<storage root>/retrains/<name>/` holds `report.html`,
`report.json` and the state.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from data_lake.tables import open_table, table_exists
from data_lake.weeks import Weeks
from ray_jobs import build_sequences, evaluate, export, ingest, train
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.job import Report, main, timed
from ray_jobs.job_metrics import JobMetrics
from ray_jobs.locks import held
from ray_jobs.publish import publish_run
from ray_jobs.retraining.challenge import compare_with_champion, time_against_champion
from ray_jobs.retraining.gates import (
    Verdict,
    check_baselines,
    check_data,
    check_export,
    check_gain,
    check_latency,
)
from ray_jobs.retraining.new_weeks import count_lake_rows, measure_weeks
from ray_jobs.retraining.report import write_retrain_report
from ray_jobs.retraining.state import (
    Done,
    State,
    read_state,
    retrains_folder,
    write_state,
)
from ray_jobs.runs import FinishedRun, open_run
from recsys.artifact import load_artifact
from recsys.errors import ArtifactError
from recsys.leaderboard import HEADLINE
from recsys.lineage import find_version_of
from recsys.registry import promote, read_serving, serving_version
from recsys.splits import SplitConfig

_MAX_NEW_WEEKS = 8


@dataclass(frozen=True)
class Found:
    """What a step found: figures for the steps after it, and what its gates say."""

    figures: dict[str, Any]
    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True)
class Step:
    """A part of the job that is done once, however often the job is started."""

    name: str
    title: str
    run: Callable[[PipelineConfig, State], Found]
    gates: tuple[str, ...] = ()


def run(config: PipelineConfig) -> Report:
    """Goes through all steps that are left.

    Raises: JobError at the first closed gate, or when another retraining is under way; whatever a
    step raises.
    """
    state = find_state(config)
    folder = retrains_folder(config) / state.name
    with held(folder.parent / ".lock", "retraining", state.name):
        # Another process may have gone on while this one came to the lock.
        state = begun = read_state(folder) or state
        write_state(folder, state)
        state = _take_steps(config, folder, state)
        _conclude(config, folder, state)
    return _report(folder, state, was_finished=bool(state.steps) and state == begun)


def preview(config: PipelineConfig) -> dict[str, Any]:
    """The plan: the champion, the steps with their gates, and which of them are done; or why there
    is none, where nothing serves yet that could be challenged.
    """
    try:
        state = find_state(config)
    except ArtifactError as error:
        return {"plan": None, "refused": str(error)}
    steps = [
        {"step": step.name, "what": step.title, "gates": step.gates, "status": _status(step, state)}
        for step in STEPS
        if step.name not in config.retrain.skip
    ]
    names = {"name": state.name, "as_of": state.as_of.isoformat(), "champion": state.champion}
    split = configure(config, state).split.model_dump(mode="json")
    return {"plan": {**names, "split": split, "steps": steps}}


def find_state(config: PipelineConfig) -> State:
    """The retraining of this name as far as it has come, or a new one against what serves now."""
    as_of = config.retrain.as_of or datetime.now(UTC)
    name = config.retrain.name or f"{as_of:%G-W%V}"
    state = read_state(retrains_folder(config) / name)
    return state or State(name, as_of, serving_version(Path(config.storage.registry_uri)))


def configure(config: PipelineConfig, state: State) -> PipelineConfig:
    """The configuration with which each job is run as a step of this retraining."""
    run = {"run": state.run}
    changes: dict[str, Any] = {"name": state.run}
    if config.train.start is not None:
        changes["start"] = config.train.start.model_copy(update={"artifact": state.champion})
    return config.model_copy(
        update={
            "split": move_split(config, state.as_of),
            "train": config.train.model_copy(update=changes),
            "evaluate": config.evaluate.model_copy(update={**run, "against": None}),
            "export": config.export.model_copy(update=run),
            "publish": config.publish.model_copy(update=run),
        }
    )


def move_split(config: PipelineConfig, as_of: datetime) -> SplitConfig:
    """A temporal cut whose test ends at a moment, or the split as it is configured."""
    if config.retrain.test_days is None:
        return config.split
    test_from = as_of - timedelta(days=config.retrain.test_days)
    validation_from = test_from - timedelta(days=config.retrain.validation_days)
    return SplitConfig(kind="temporal-cut", validation_from=validation_from, test_from=test_from)


def find_weeks(config: PipelineConfig, as_of: datetime, champion: dict[str, Any]) -> Weeks:
    """The weeks that are new to the champion, at least one, and those before.

    A week that was refused is new until a champion has learned from it: it stays out of what later
    weeks are compared with.
    """
    limits = config.retrain
    known_until = (champion.get("retrain") or {}).get("as_of")
    if known_until is not None:
        days = (as_of - datetime.fromisoformat(known_until)) / timedelta(days=1)
    elif champion.get("trained_until_us") is not None:
        days = as_of.timestamp() / 86_400 - champion["trained_until_us"] / 86_400e6
    else:
        days = limits.week_days
    num_new = min(max(1, round(days / limits.week_days)), _MAX_NEW_WEEKS)
    return Weeks.ending(as_of, limits.week_days, num_new, limits.reference_weeks)


def _take_steps(config: PipelineConfig, folder: Path, state: State) -> State:
    for step in STEPS:
        if state.closed is not None:
            break
        if step.name in state.steps or step.name in config.retrain.skip:
            continue
        started = time.perf_counter()
        with timed(step.title):
            found = step.run(configure(config, state), state)
        seconds = round(time.perf_counter() - started, 3)
        state = state.with_step(step.name, Done(found.figures, found.verdicts, seconds))
        write_state(folder, state)
    return state


def _ingest(config: PipelineConfig, state: State) -> Found:
    before = {f"{name}_version_before": version for name, version in _versions(config).items()}
    return Found({**ingest.run(config).figures, **before})


def _check_data(config: PipelineConfig, state: State) -> Found:
    champion = load_artifact(_champion(config, state))
    weeks = find_weeks(config, state.as_of, champion.manifest)
    figures = measure_weeks(config, weeks, champion.catalogue)
    rows, before = count_lake_rows(config), champion.manifest.get("lake_rows") or {}
    new = {name: max(0, rows.get(name, 0) - before.get(name, 0)) for name in rows}
    verdicts = check_data(figures, new["events"], new.get("quarantine", 0), config.retrain)
    return Found({"lake_rows": rows, "new_rows": new, "weeks": vars(figures)}, tuple(verdicts))


def _build_sequences(config: PipelineConfig, state: State) -> Found:
    return Found(build_sequences.run(config).figures)


def _train(config: PipelineConfig, state: State) -> Found:
    folder = Path(config.storage.runs_uri) / state.run
    # It was killed between the end of the training and the note that it had ended.
    is_finished = (folder / "run.json").exists()
    return Found({"run": state.run} if is_finished else train.run(config).figures)


def _evaluate(config: PipelineConfig, state: State) -> Found:
    figures = evaluate.run(config).figures
    if not config.publish.must_beat_baselines:
        return Found(figures)
    compared = _challenger(config, state).evaluation()["comparisons"]
    differences = {name: found["difference"] for name, found in compared.items()}
    return Found(figures, (check_baselines(differences),))


def _compare(config: PipelineConfig, state: State) -> Found:
    champion = _champion(config, state)
    found = compare_with_champion(config, _challenger(config, state), champion)
    return Found(found, (check_gain(found["metrics"][HEADLINE], config.retrain.min_gain),))


def _export(config: PipelineConfig, state: State) -> Found:
    measured = export.measure(config, _challenger(config, state))
    verdicts = [
        check_export(one.variant, *one.figure_and_limit(config.export), one.refusal(config.export))
        for one in measured
    ]
    return Found({one.variant: one.facts() for one in measured}, tuple(verdicts))


def _time(config: PipelineConfig, state: State) -> Found:
    times = time_against_champion(_challenger(config, state), _champion(config, state))
    limit = config.retrain.max_latency_ratio
    return Found({**times}, (check_latency(times["challenger_s"], times["champion_s"], limit),))


def _publish(config: PipelineConfig, state: State) -> Found:
    # It was killed between the publication and the note of it.
    version = find_version_of(Path(config.storage.registry_uri), state.run)
    if version is None:
        version = publish_run(config, _lineage(state)).name
    return Found({"version": version})


def _promote(config: PipelineConfig, state: State) -> Found:
    version, share = state.steps["publish"].figures["version"], config.retrain.canary_share
    root = Path(config.storage.registry_uri)
    serving = read_serving(root)
    # Unless it was killed between the promotion and the note of it.
    if serving.share_of(version) != share:
        serving = promote(root, version, share, champion=state.champion)
    return Found({"champion": serving.champion, "shares": dict(serving.shares)})


STEPS: tuple[Step, ...] = (
    Step("ingest", "new events into the lake", _ingest),
    Step(
        "data",
        "whether the new weeks look like those before",
        _check_data,
        ("quarantine", "volume-low", "volume-high", "unknown-items", "popularity", "agreement"),
    ),
    Step("sequences", "events into sequences", _build_sequences),
    Step("train", "the challenger", _train),
    Step("evaluate", "the challenger against the baselines", _evaluate, ("baselines",)),
    Step("compare", "the challenger against the champion", _compare, ("gain",)),
    Step("export", "the encoder for serving", _export, ("export-<variant>",)),
    Step("latency", "how long a request takes", _time, ("latency",)),
    Step("publish", "the artifact", _publish),
    Step("canary", "a share of the visitors", _promote),
)


def _versions(config: PipelineConfig) -> dict[str, int]:
    """Of the tables that events come into."""
    lake_uri, options = config.storage.lake_uri, config.storage.options
    return {
        name: open_table(lake_uri, name, options).version()
        for name in ("events", "quarantine")
        if table_exists(lake_uri, name, options)
    }


def _champion(config: PipelineConfig, state: State) -> Path:
    return Path(config.storage.registry_uri) / state.champion


def _challenger(config: PipelineConfig, state: State) -> FinishedRun:
    return open_run(config, state.run)


def _lineage(state: State) -> dict[str, Any]:
    """What the manifest says beside what `ray_jobs.publish` writes."""
    compared = state.steps["compare"].figures["metrics"][HEADLINE]
    verdicts = [verdict.facts() for verdict in state.verdicts]
    facts = {"name": state.name, "as_of": state.as_of.isoformat(), "champion": state.champion}
    found: dict[str, Any] = {"retrain": {**facts, "comparison": compared, "gates": verdicts}}
    if "data" in state.steps:
        # As they were when the gates looked: what has come since is new to the next one.
        found["lake_rows"] = state.steps["data"].figures["lake_rows"]
    return found


def _conclude(config: PipelineConfig, folder: Path, state: State) -> None:
    """The report, and what Prometheus is told."""
    write_retrain_report(folder, state, {step.name: step.title for step in STEPS})
    metrics = JobMetrics("retrain", config)
    passed = state.closed is None
    metrics.set("nextitem_retrain_passed", passed, "Whether the last retraining passed all gates.")
    for verdict in state.verdicts:
        meaning = "Whether the last retraining passed a gate."
        metrics.set("nextitem_retrain_gate_passed", verdict.passed, meaning, gate=verdict.gate)
    gain = _gain(state)
    if gain is not None:
        meaning = "Gain of the last challenger over the champion in NDCG@10, relative."
        metrics.set("nextitem_challenger_ndcg10_gain_ratio", gain, meaning)
    metrics.publish()


def _gain(state: State) -> float | None:
    if "compare" not in state.steps:
        return None
    lift: float | None = state.steps["compare"].figures["metrics"][HEADLINE]["lift"]
    return lift


def _report(folder: Path, state: State, *, was_finished: bool) -> Report:
    """Raises: JobError when a gate is closed."""
    closed = state.closed
    if closed is not None:
        raise JobError(
            f"The retraining {state.name} stopped at the gate {closed.gate!r}: {closed.text} The "
            f"limit is {closed.limit:g}; {state.champion} serves on. See "
            f"{folder / 'report.html'}, and give retrain.name another value to begin anew."
        )
    version = state.steps["publish"].figures["version"] if "publish" in state.steps else None
    figures = {
        "name": state.name,
        "champion": state.champion,
        "version": version,
        "gain_ndcg10": _gain(state),
        **{verdict.gate: verdict.figure for verdict in state.verdicts},
        "seconds": sum(done.seconds for done in state.steps.values()),
        "report": str(folder / "report.html"),
    }
    headline = f"{version or state.run} passed all gates"
    if was_finished:
        headline += " before; give retrain.name another value to begin anew"
    return Report("retrain", headline, figures)


def _status(step: Step, state: State) -> str:
    return "finished" if step.name in state.steps else "to do"


if __name__ == "__main__":
    main(run, job="retrain", preview=preview)

"""The champion against a challenger: on the same held-out users, and side by side on the clock."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from ray_jobs.config import PipelineConfig
from ray_jobs.evaluate import MODEL
from ray_jobs.exchange import get
from ray_jobs.runs import EXPORT, FinishedRun
from ray_jobs.sequences_reader import Vocabulary, collect_tokens, load_tokens, open_sequences
from ray_jobs.targets import choose_targets
from recsys.artifact import Artifact, load_artifact
from recsys.champion import find_known_targets, make_request, rank_as_served, time_in_turn
from recsys.encoders import make_encoder
from recsys.leaderboard import compare_runs, comparison_facts
from recsys.model import NextItemModel
from recsys.splits import SplitConfig


def compare_with_champion(
    config: PipelineConfig, finished: FinishedRun, champion: Path
) -> dict[str, Any]:
    """Difference and lift of an evaluated run against a published version, by metric.

    Both rank the same targets, which the run's evaluation ranked; see `recsys.champion` for what
    the version is given. Raises: JobError, TableError, ArtifactError.
    """
    artifact = load_artifact(champion)
    known = Vocabulary(artifact.catalogue, artifact.context, artifact.attributes)
    sequences = open_sequences(config, finished.facts["sequences_version"])
    ours = load_tokens(sequences, config, finished.vocabulary)
    theirs = load_tokens(sequences, config, known)
    num_gpus = 1 if ray.available_resources().get("GPU", 0) >= 1 else 0
    task = ray.remote(num_gpus=num_gpus)(compare_on_targets)
    facts: dict[str, Any] = get(task.remote(config, finished, artifact, ours, theirs))
    return facts


def compare_on_targets(
    config: PipelineConfig,
    finished: FinishedRun,
    artifact: Artifact,
    ours: ray.data.Dataset,
    theirs: ray.data.Dataset,
) -> dict[str, Any]:
    """The work of `compare_with_champion`, on one worker."""
    catalogue = finished.vocabulary.catalogue
    split = SplitConfig.model_validate(finished.facts["config"]["split"])
    store = collect_tokens(ours, len(finished.vocabulary.context.fields))
    targets = choose_targets(store, split, catalogue, config, finished.targets)
    positions_N = find_known_targets(store, catalogue, targets.targets_N, artifact.catalogue)
    ranks_N = rank_as_served(
        artifact,
        collect_tokens(theirs, len(artifact.context.fields)),
        targets.users_N,
        positions_N,
        num_rows=catalogue.num_rows,
        filter_seen=config.evaluate.filter_seen,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    of_champion = _with_ranks(targets.ranks(), ranks_N)
    found = compare_runs(finished.ranks(), of_champion, (MODEL,), seed=config.seed)[MODEL]
    return {
        "champion": artifact.version,
        "num_users": len(ranks_N),
        "num_targets_unknown_to_champion": int((positions_N < 0).sum()),
        "metrics": {metric: comparison_facts(one) for metric, one in found.items()},
    }


def time_against_champion(finished: FinishedRun, champion: Path) -> dict[str, float]:
    """Seconds of one request in the exported fp32 rankers of both, on one core of one worker.

    Raises: ArtifactError when either was not exported.
    """
    facts: dict[str, float] = get(ray.remote(_time_both).remote(finished, champion))
    return facts


def _time_both(finished: FinishedRun, champion: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    rankers = (
        (finished.load_model(), finished.folder / EXPORT),
        (load_artifact(champion).load_model(), champion),
    )
    ours_s, theirs_s = time_in_turn([_request(model, folder) for model, folder in rankers])
    return {"challenger_s": ours_s, "champion_s": theirs_s}


def _request(model: NextItemModel, folder: Path) -> Any:
    model = model.materialised()
    encode = make_encoder(model, folder, backend="onnx", variant="fp32", provider="cpu")
    return make_request(model, encode)


def _with_ranks(targets: pa.Table, ranks_N: np.ndarray) -> pa.Table:
    return targets.append_column(MODEL, pa.array(ranks_N.astype(np.int32)))

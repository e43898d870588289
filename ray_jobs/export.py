"""Exports the encoder of a finished run in the variants that serving may choose from, and measures
what each of them loses against the model.

    python -m ray_jobs.export --config synthetic --set 'export.variants=["fp32", "int8", "bf16"]'

Writes `export/` in the run's folder: the files and `export.json`, what was measured. A variant that
is too far from the model is not kept, and the job fails; those that passed stay. `ray_jobs.publish`
takes what is there: a published version is sealed and gets no file afterwards.
"""

import json
import logging
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.exceptions import RayTaskError

from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.job import Report, main
from ray_jobs.runs import EXPORT, FinishedRun, open_run
from ray_jobs.sections.models import ExportConfig
from ray_jobs.sequences_reader import collect_tokens, load_tokens, open_sequences
from recsys.artifact import sha256_of
from recsys.comparison import Comparison, compare
from recsys.encoders import Backend, Encoder, Variant, make_encoder, variant_file
from recsys.evaluation import rank_targets
from recsys.export import Parity, export_variant, parity
from recsys.leaderboard import comparison_facts
from recsys.model import NextItemModel
from recsys.scorer import ModelScorer
from recsys.splits import SplitConfig, split_tokens
from recsys.tokens import TokenStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """How far one variant is from the model."""

    variant: Variant
    parity: Parity
    ndcg: Comparison
    """The variant against the model, on the validation users."""
    num_bytes: int

    def facts(self) -> dict[str, Any]:
        """For export.json."""
        ndcg = comparison_facts(self.ndcg)
        return {**asdict(self.parity), "ndcg": ndcg, "bytes": self.num_bytes}

    def figure_and_limit(self, config: ExportConfig) -> tuple[float, float]:
        """What decides whether it may serve: the overlap, at least; or the loss, at most."""
        if self.variant == "fp32":
            return self.parity.overlap, config.least_overlap
        return -self.ndcg.difference.low, config.max_ndcg_loss

    def refusal(self, config: ExportConfig) -> str | None:
        """Why it may not serve, in words; None where it may."""
        if self.variant == "fp32":
            if self.parity.overlap >= config.least_overlap:
                return None
            return (
                f"fp32 has only {self.parity.overlap:.2%} of the model's top 10 (largest "
                f"difference of scores {self.parity.max_difference:.2g})"
            )
        loss = -self.ndcg.difference.low
        if loss <= config.max_ndcg_loss:
            return None
        return f"{self.variant} may lose {loss:.4f} of NDCG@10 (at most {config.max_ndcg_loss})"


@dataclass(frozen=True)
class Validation:
    """The targets that losses are measured on."""

    store: TokenStore
    users_N: np.ndarray
    targets_N: np.ndarray
    known_at_request_F: np.ndarray
    filter_seen: bool

    def ranks(self, model: NextItemModel, encode: Encoder | None = None) -> np.ndarray:
        """Rank of each target, from 1."""
        scorer = ModelScorer(model, self.known_at_request_F, encode=encode)
        where = self.store, self.users_N, self.targets_N
        return rank_targets(scorer, *where, filter_seen=self.filter_seen).ranks_N


def run(config: PipelineConfig) -> Report:
    """Exports and measures. Raises: JobError when a variant is too far from the model."""
    finished = open_run(config, config.export.run)
    return _report(finished, config.export, measure(config, finished))


def measure(config: PipelineConfig, finished: FinishedRun) -> list[Measured]:
    """Exports on a worker, and says how far each variant is from the model."""
    sequences = open_sequences(config, finished.facts["sequences_version"])
    tokens = load_tokens(sequences, config, finished.vocabulary)
    num_cpus = max(1, int(ray.available_resources().get("CPU", 1)))
    task = ray.remote(num_cpus=num_cpus)(export_run)
    try:
        measured: list[Measured] = ray.get(task.remote(config, finished, tokens, num_cpus))
    except RayTaskError as error:
        # The worker's own error: one sentence, without the worker's traceback in it.
        raise error.cause from error
    return measured


def export_run(
    config: PipelineConfig, finished: FinishedRun, tokens: ray.data.Dataset, num_threads: int
) -> list[Measured]:
    """Writes `export/` in the run's folder; runs on one worker. Raises: JobError when no user has a
    validation event.
    """
    torch.set_num_threads(num_threads)
    store = collect_tokens(tokens, len(finished.vocabulary.context.fields))
    validation = choose_validation(store, finished, config)
    model = finished.load_model().materialised()
    folder = finished.folder / f".{EXPORT}-{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        measured = write_variants(model, folder, config.export.variants, validation, config.seed)
        for one in measured:
            if one.refusal(config.export):
                _remove(folder, one.variant)
        _write_facts(folder, finished, config.export, measured)
        shutil.rmtree(finished.folder / EXPORT, ignore_errors=True)
        folder.rename(finished.folder / EXPORT)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return measured


def choose_validation(
    store: TokenStore, finished: FinishedRun, config: PipelineConfig
) -> Validation:
    """The validation events of all users, or of a seeded sample of `export.max_users`.

    Raises: JobError when there is none.
    """
    split_config = SplitConfig.model_validate(finished.facts["config"]["split"])
    targets_U = split_tokens(store, split_config, finished.targets).validation_U
    users = np.flatnonzero(targets_U >= 0)
    if len(users) == 0:
        raise JobError(
            f"No user has a validation event under the {split_config.kind} split, on which an "
            "export is measured; publish exports fp32 without."
        )
    if len(users) > config.export.max_users:
        generator = np.random.default_rng(config.seed)
        users = np.sort(generator.choice(users, config.export.max_users, replace=False))
    known_F = finished.vocabulary.context.known_at_request_F
    return Validation(store, users, targets_U[users], known_F, config.evaluate.filter_seen)


def write_variants(
    model: NextItemModel,
    folder: Path,
    variants: tuple[Variant, ...],
    validation: Validation,
    seed: int,
) -> list[Measured]:
    """Each variant in turn, fp32 among them always: int8 is made of it."""
    expected_N = validation.ranks(model)
    measured = []
    wanted: dict[Variant, None] = dict.fromkeys(("fp32", *variants))
    for variant in wanted:
        path = export_variant(model, variant, folder)
        backend: Backend = "torch" if path is None else "onnx"
        encode = make_encoder(model, folder, backend=backend, variant=variant, provider="cpu")
        with torch.no_grad():
            ranks_N = validation.ranks(model, encode)
        ndcg = compare(ranks_N, expected_N, seed=seed)
        files = [] if path is None else list(folder.glob(f"{path.name}*"))
        size = sum(file.stat().st_size for file in files)
        measured.append(Measured(variant, parity(model, encode), ndcg, size))
        log.info("%s: %s", variant, measured[-1].facts())
    return measured


def _remove(folder: Path, variant: Variant) -> None:
    for path in folder.glob(f"{variant_file(variant)}*"):
        path.unlink()


def _write_facts(
    folder: Path, finished: FinishedRun, config: ExportConfig, measured: list[Measured]
) -> None:
    facts = {
        # An export belongs to these weights and to no others.
        "weights_sha256": sha256_of(finished.folder / "model.safetensors"),
        "gates": config.model_dump(mode="json", include={"least_overlap", "max_ndcg_loss"}),
        "variants": {one.variant: one.facts() for one in measured if not one.refusal(config)},
        "refused": {one.variant: one.refusal(config) for one in measured if one.refusal(config)},
    }
    (folder / "export.json").write_text(json.dumps(facts, indent=1))


def _report(finished: FinishedRun, config: ExportConfig, measured: list[Measured]) -> Report:
    refusals = [refusal for one in measured if (refusal := one.refusal(config))]
    if refusals:
        raise JobError(
            f"The run {finished.folder.name} is not exported in full: {'; '.join(refusals)}. Leave "
            "these out of export.variants, or allow more."
        )
    figures: dict[str, Any] = {"run": finished.folder.name, "path": str(finished.folder / EXPORT)}
    for one in measured:
        difference = one.ndcg.difference
        figures |= {
            f"{one.variant}_overlap": one.parity.overlap,
            f"{one.variant}_max_difference": one.parity.max_difference,
            f"{one.variant}_ndcg10_change": difference.mean,
            f"{one.variant}_ndcg10_change_low": difference.low,
            f"{one.variant}_ndcg10_change_high": difference.high,
            f"{one.variant}_bytes": one.num_bytes,
        }
    return Report("export", f"{', '.join(one.variant for one in measured)} may serve", figures)


if __name__ == "__main__":
    main(run, job="export")

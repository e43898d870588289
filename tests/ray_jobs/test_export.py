"""What is exported beside a run, and what is refused; the job itself is walked in test_road."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ray_jobs.errors import JobError
from ray_jobs.export import Measured, Validation, _report, write_variants
from ray_jobs.runs import EXPORT, FinishedRun
from ray_jobs.sections.models import ExportConfig
from recsys.artifact import load_artifact, sha256_of
from recsys.comparison import compare
from recsys.export import Parity


def measured(variant, ours, theirs, overlap=1.0):
    ndcg = compare(np.array(ours), np.array(theirs))
    return Measured(variant, Parity(overlap, 0.5), ndcg, 100)


def test_fp32_is_held_to_the_top_ten_of_the_model():
    config = ExportConfig(least_overlap=0.9)

    assert measured("fp32", [1, 2], [1, 2], overlap=0.9).refusal(config) is None
    refusal = measured("fp32", [1, 2], [1, 2], overlap=0.89).refusal(config)
    assert refusal == (
        "fp32 has only 89.00% of the model's top 10 (largest difference of scores 0.5)"
    )


def test_smaller_numbers_are_held_to_what_they_may_lose():
    # One of a hundred users falls out of the first ten: at worst four or so in a resample.
    before, after = [1] * 100, [20] + [1] * 99

    assert measured("int8", after, before).refusal(ExportConfig(max_ndcg_loss=0.05)) is None
    refusal = measured("int8", after, before).refusal(ExportConfig(max_ndcg_loss=0.011))
    assert refusal.startswith("int8 may lose 0.0")
    assert refusal.endswith("of NDCG@10 (at most 0.011)")


def test_a_job_with_a_refused_variant_fails_and_names_it(tmp_path):
    run = SimpleNamespace(folder=tmp_path / "run-1")

    with pytest.raises(JobError, match=r"run-1 is not exported in full: fp32 has only 50\.00%"):
        _report(run, ExportConfig(), [measured("fp32", [1, 2], [1, 2], overlap=0.5)])


def test_each_variant_is_measured_against_the_model(shop, registry, tmp_path):
    artifact = load_artifact(registry / "v1")
    users = np.arange(shop.store.num_users)
    targets = shop.store.offsets_U[1:] - 1
    known_F = shop.context.known_at_request_F
    validation = Validation(shop.store, users, targets, known_F, filter_seen=False)

    found = write_variants(artifact.load_model(), tmp_path, ("bf16", "int8"), validation, seed=0)

    assert [one.variant for one in found] == ["fp32", "bf16", "int8"]
    assert found[0].ndcg.difference.mean == 0
    assert found[0].parity.overlap == 1
    assert found[1].num_bytes == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.int8.onnx"}
    assert all(one.ndcg.difference.low >= -0.2 for one in found)


def test_an_export_of_other_weights_does_not_count(registry, tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((registry / "v1" / "model.safetensors").read_bytes())
    (tmp_path / EXPORT).mkdir()
    facts = {"weights_sha256": sha256_of(weights), "variants": {}}
    (tmp_path / EXPORT / "export.json").write_text(json.dumps(facts))
    run = FinishedRun(tmp_path, {}, None)

    assert run.exported() == facts
    weights.write_bytes(b"other")
    assert run.exported() is None

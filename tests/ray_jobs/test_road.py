"""The whole road on a tiny shop, stage by stage on one Ray: each test stands on the one before."""

import json
from pathlib import Path

import pytest
import ray
from ray import serve as ray_serve

from data_lake.errors import TableError
from ray_jobs import (
    build_sequences,
    evaluate,
    export,
    generate,
    ingest,
    materialize,
    publish,
    serve,
    train,
)
from ray_jobs.errors import JobError
from ray_jobs.http_checks import check_endpoint
from ray_jobs.runs import open_run
from ray_jobs.sequences_reader import open_sequences, widen_context
from recsys.artifact import load_artifact
from recsys.context import ContextConfig, ContextEncoder
from recsys.registry import serving_version

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_events_become_sequences(tiny):
    generate.run(tiny)
    ingested = ingest.run(tiny).figures
    assert ingested["read"] == (
        ingested["committed"] + ingested["duplicate"] + ingested["quarantined"]
    )
    assert ingested["duplicate"] > 0  # the shop is dirty on purpose
    assert ingested["quarantined"] > 0
    built = build_sequences.run(tiny).figures
    assert built["events_read"] == ingested["committed"]
    assert "nothing to do" in build_sequences.run(tiny).headline


def test_two_workers_train_and_leave_a_run_behind(tiny):
    report = train.run(tiny)
    run = open_run(tiny, None)
    assert run.facts["name"] == report.figures["run"]
    assert [entry["epoch"] for entry in run.facts["history"]] == [1, 2]
    assert report.figures["workers"] == 2
    assert run.load_model().config.dim == 16
    told = (Path(tiny.storage.root) / "metrics" / "train.prom").read_text()
    ndcg10 = report.figures["validation_ndcg10"]
    assert f'nextitem_train_ndcg10_ratio{{data="synthetic"}} {ndcg10}' in told
    assert "nextitem_train_seconds{" in told
    assert "nextitem_train_tokens_per_second{" in told


def test_the_run_is_held_against_every_baseline(tiny):
    figures = evaluate.run(tiny).figures
    evaluation = open_run(tiny, None).evaluation()
    assert set(evaluation["comparisons"]) == set(tiny.evaluate.baselines)
    assert "NDCG@10" in evaluation["table"]
    wins = [row["difference"] > 0 for row in evaluation["comparisons"].values()]
    assert figures["beats_all_baselines"] == all(wins)


def test_a_report_slices_by_what_the_run_does_not_read(tiny):
    sequences = open_sequences(tiny)
    config = ContextConfig(categorical=("event_type",), time=("gap",))
    own = ContextEncoder.learn(config, {"event_type": {"view": 2, "purchase": 1}})
    wide = widen_context(sequences, tiny, own, ("event_type", "segment", "device"))
    assert wide.fields == ("event_type", "segment", "device", "gap")
    assert wide.vocabularies["event_type"] == ("view", "purchase")
    read = open_run(tiny, None).vocabulary.context.vocabularies
    for name in ("segment", "device"):
        assert wide.vocabularies[name] == read[name]
    assert widen_context(sequences, tiny, own, ("event_type",)) is own
    with pytest.raises(TableError, match=r"evaluate.slices names colour, which no event carries"):
        widen_context(sequences, tiny, own, ("colour",))


def test_a_model_below_a_baseline_is_not_published(tiny):
    run = open_run(tiny, None)
    path = run.folder / "evaluation.json"
    evaluation = json.loads(path.read_text())
    beaten = {**evaluation, "comparisons": {"popularity": {"difference": -0.1}}}
    strict = tiny.model_copy(
        update={"publish": tiny.publish.model_copy(update={"must_beat_baselines": True})}
    )
    path.write_text(json.dumps(beaten))
    with pytest.raises(JobError, match="popularity reached at least its NDCG@10"):
        publish.run(strict)
    path.write_text(json.dumps(evaluation))
    assert not Path(tiny.storage.registry_uri).exists()


def test_variants_of_the_encoder_are_exported_with_what_they_lose(tiny):
    wanted = {"variants": ("int8", "bf16"), "max_ndcg_loss": 1.0}
    figures = export.run(
        tiny.model_copy(update={"export": tiny.export.model_copy(update=wanted)})
    ).figures
    assert figures["fp32_overlap"] >= 0.999
    assert figures["int8_ndcg10_change_low"] <= figures["int8_ndcg10_change_high"]
    assert set(open_run(tiny, None).exported()["variants"]) == {"fp32", "int8", "bf16"}


def test_the_published_artifact_says_where_it_comes_from(tiny):
    version = publish.run(tiny).figures["version"]
    registry = Path(tiny.storage.registry_uri)
    artifact = load_artifact(registry / version)
    assert serving_version(registry) == version
    assert artifact.manifest["tables"] == {"sequences": 1, "items": 1}
    assert artifact.manifest["sequences_from"]["events_version"] == 1
    assert artifact.manifest["seed"] == tiny.seed
    assert artifact.metrics()["run"] == artifact.manifest["run"]
    exported = {"model.onnx", "model.int8.onnx", "export.json"}
    assert exported <= set(artifact.manifest["files"])


def test_real_requests_are_answered_also_without_the_ranker(tiny):
    materialize.run(tiny)
    try:
        report = serve.run(tiny)
        assert report.headline.endswith("is ready")
        # The tests' Ray was started without HAProxy, and the job cannot change that.
        assert report.figures["http"].startswith("proxy, the slow one")
        checks = check_endpoint(tiny)
        assert not [f"{check.title}: {check.seen}" for check in checks if not check.passed]
    finally:
        ray_serve.shutdown()
    assert ray.is_initialized()

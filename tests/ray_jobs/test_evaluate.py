"""The evaluation of a run: what is ranked, what is written, and what is refused."""

import dataclasses
import json
from datetime import UTC, datetime
from itertools import pairwise
from math import isclose
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_lake.schemas import sequences_schema
from data_lake.tables import commit_parts, create_table, write_part
from ray_jobs import evaluate
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import ConfigError, JobError
from ray_jobs.report import write_report
from ray_jobs.runs import open_run
from ray_jobs.sections.models import EvaluateConfig
from ray_jobs.sections.storage import StorageConfig
from ray_jobs.targets import choose_targets
from recsys.artifact import save_model
from recsys.baseline_search import choose_settings, try_settings
from recsys.baselines import EASE, Covisitation
from recsys.context import ContextConfig, ContextEncoder
from recsys.evaluation import rank_targets
from recsys.metrics import mean_accuracy
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.splits import SplitConfig, leave_one_out
from recsys.targets import TargetsConfig

INGEST = {"events": [{"path": "events", "format": "parquet", "columns": {}}]}


def pipeline(root, **options):
    storage = StorageConfig(root=str(root))
    return PipelineConfig(
        name="toy",
        storage=storage,
        ingest=INGEST,
        evaluate=EvaluateConfig(**options),
    )


def write_run(config, shop, name="r1", split=None, targets=None):
    """A run folder with an untrained model, as `ray_jobs.train` leaves it."""
    folder = Path(config.storage.runs_uri) / name
    torch.manual_seed(0)
    sizes = ModelConfig(dim=16, num_layers=1, num_heads=2, max_len=10)
    model = NextItemModel(sizes, shop.catalogue.num_rows, shop.context.sizes)
    save_model(folder, model, shop.catalogue, shop.context)
    train = config.train.model_copy(update={"targets": targets or config.train.targets})
    trained = config.model_copy(update={"split": split or config.split, "train": train})
    facts = {
        "name": name,
        "seed": 0,
        "config": trained.model_dump(mode="json"),
        "recipe": {"name": "bert4rec", "model": sizes.model_dump(mode="json")},
        "sequences_version": 1,
        "items_version": None,
        "best": {"epoch": 2, "ndcg10": 0.02},
        "history": [
            {"epoch": 1, "loss": 3.7, "ndcg10": float("nan")},
            {"epoch": 2, "loss": 3.6, "ndcg10": 0.02},
        ],
    }
    (folder / "run.json").write_text(json.dumps(facts))
    (folder.parent / "LATEST").write_text(name)
    return open_run(config, name)


class Tokens:
    """A data set of one block, without Ray."""

    def __init__(self, store):
        self._table = store.to_arrow()

    def iter_batches(self, **options):
        yield self._table


@pytest.fixture
def evaluated(tmp_path, shop):
    config = pipeline(tmp_path)
    return evaluate.evaluate_run(config, write_run(config, shop), Tokens(shop.store), 1)


def test_every_row_has_intervals(evaluated):
    evaluation, _ = evaluated
    assert list(evaluation["rows"]) == [
        "model",
        "model, time-blind",
        "popularity",
        "recent-popularity",
        "covisitation",
        "item-knn",
        "als",
        "ease",
    ]
    for row in evaluation["rows"].values():
        assert row["NDCG@10"]["low"] <= row["NDCG@10"]["mean"] <= row["NDCG@10"]["high"]
        assert 0 < row["coverage@10"] <= 1


def test_the_model_is_compared_with_each_baseline(evaluated):
    evaluation, _ = evaluated
    rows, comparisons = evaluation["rows"], evaluation["comparisons"]
    assert set(comparisons) == set(rows) - {"model", "model, time-blind"}
    for name, found in comparisons.items():
        difference = rows["model"]["NDCG@10"]["mean"] - rows[name]["NDCG@10"]["mean"]
        assert isclose(found["difference"], difference, abs_tol=1e-12)


def test_the_protocol_is_written_down(evaluated, shop):
    evaluation, _ = evaluated
    assert evaluation["protocol"]["kind"] == "leave-one-out"
    assert evaluation["filter_seen"] is True
    assert evaluation["num_users"] == shop.store.num_users
    assert len(evaluation["targets_sha256"]) == 64
    json.dumps(evaluation)


@pytest.mark.parametrize("slices", ["slices", "baseline_slices"])
def test_slices_add_up_to_all_users(evaluated, slices):
    evaluation, _ = evaluated
    assert set(evaluation[slices]) == {
        "history_length",
        "item_training_events",
        "time_since_last_event",
        *("device", "segment", "event_type", "hour", "weekday"),
    }
    for labels in evaluation[slices].values():
        assert sum(part["num_users"] for part in labels.values()) == evaluation["num_users"]


def test_the_strongest_baseline_is_sliced_too(evaluated):
    evaluation, _ = evaluated
    rows, strongest = evaluation["rows"], evaluation["strongest_baseline"]
    means = {name: rows[name]["NDCG@10"]["mean"] for name in evaluation["comparisons"]}
    assert means[strongest] == max(means.values())
    parts = evaluation["baseline_slices"]["segment"].values()
    total = sum(part["num_users"] * part["mean"] for part in parts)
    assert isclose(total / evaluation["num_users"], means[strongest])


def test_slices_are_means_over_their_own_targets(evaluated, shop):
    evaluation, ranks = evaluated
    store = shop.store
    targets_N = store.offsets_U[1:] - 1
    # Leave-one-out: the last two events of each user do not train.
    is_training_T = np.ones(store.num_tokens, bool)
    is_training_T[np.concatenate([targets_N, targets_N - 1])] = False
    counts_I = np.bincount(store.items_T[is_training_T], minlength=shop.catalogue.num_rows)
    num_events_N = counts_I[store.items_T[targets_N]]
    is_known_N = num_events_N >= 10
    segments_N = store.context_TF[targets_N, shop.context.fields.index("segment")]
    strongest = evaluation["strongest_baseline"]
    for slices, row in (("slices", "model"), ("baseline_slices", strongest)):
        ranks_N = ranks[row].to_numpy()
        values_N = np.where(ranks_N <= 10, 1 / np.log2(ranks_N + 1), 0)
        assert as_means(evaluation[slices]["item_training_events"]) == {
            "1-9": (sum(~is_known_N), pytest.approx(values_N[~is_known_N].mean())),
            "10-99": (sum(is_known_N), pytest.approx(values_N[is_known_N].mean())),
        }
        assert as_means(evaluation[slices]["segment"]) == {
            name: (sum(segments_N == code), pytest.approx(values_N[segments_N == code].mean()))
            for code, name in enumerate(["unknown", *shop.context.vocabularies["segment"]])
        }


def as_means(parts):
    return {label: (found["num_users"], found["mean"]) for label, found in parts.items()}


def test_a_run_without_context_is_sliced_by_hour_and_weekday_too(tmp_path, shop, evaluated):
    context = ContextEncoder.learn(ContextConfig(categorical=(), time=()), {})
    store = dataclasses.replace(shop.store, context_TF=shop.store.context_TF[:, :0])
    blind = dataclasses.replace(shop, context=context, store=store)
    config = pipeline(tmp_path, baselines=("popularity",))
    finished = write_run(config, blind, "blind")
    evaluation, _ = evaluate.evaluate_run(config, finished, Tokens(store), 1)
    write_report(finished.folder, evaluation | NOT_OF_THE_WORKER, finished.facts)
    for name in ("hour", "weekday"):
        sizes, expected = (
            {label: found["num_users"] for label, found in one["slices"][name].items()}
            for one in (evaluation, evaluated[0])
        )
        assert sizes == expected
        assert (finished.folder / "plots" / f"slice-{name}.svg").exists()


def test_fields_that_a_run_does_not_read_slice_it_and_change_no_rank(tmp_path, shop, evaluated):
    read = ("event_type", "hour")
    config = ContextConfig(categorical=read[:1], time=read[1:])
    context = ContextEncoder(config, {"event_type": shop.context.vocabularies["event_type"]})
    read_F = [shop.context.fields.index(name) for name in read]
    store = dataclasses.replace(shop.store, context_TF=shop.store.context_TF[:, read_F])
    narrow = dataclasses.replace(shop, context=context, store=store)
    options = pipeline(tmp_path, baselines=("popularity",))
    finished = write_run(options, narrow, "narrow")

    alone, ranks = evaluate.evaluate_run(options, finished, Tokens(store), 1)
    sliced, same_ranks = evaluate.evaluate_run(
        options, finished, Tokens(shop.store), 1, sliced=shop.context
    )
    assert same_ranks.equals(ranks)
    assert set(sliced["slices"]) - set(alone["slices"]) == {"device", "segment"}
    for name in ("device", "segment"):
        sizes, expected = (
            {label: found["num_users"] for label, found in one["slices"][name].items()}
            for one in (sliced, evaluated[0])
        )
        assert sizes == expected


NOT_OF_THE_WORKER = {
    "sequences_from": None,
    "command": "python -m ray_jobs.evaluate",
    "evaluated_at": "2025-11-21T10:00:00+00:00",
}
"""What `run` adds to an evaluation."""


def test_only_the_time_blind_row_ignores_the_context_of_the_target(tmp_path, shop, evaluated):
    targets_N = shop.store.offsets_U[1:] - 1
    context_TF = shop.store.context_TF.copy()
    sizes_F = np.array(shop.context.sizes)
    context_TF[targets_N] = (context_TF[targets_N] + 1) % sizes_F
    config = pipeline(tmp_path, baselines=("popularity",))
    finished = open_run(config, None)
    store = dataclasses.replace(shop.store, context_TF=context_TF)
    _, ranks = evaluate.evaluate_run(config, finished, Tokens(store), 1)
    assert ranks["model, time-blind"].equals(evaluated[1]["model, time-blind"])
    assert not ranks["model"].equals(evaluated[1]["model"])


@pytest.mark.parametrize("filter_seen", [True, False])
def test_seen_targets_rank_last_unless_seen_items_are_kept(tmp_path, shop, filter_seen):
    config = pipeline(tmp_path, baselines=("popularity",), filter_seen=filter_seen)
    finished = write_run(config, shop)
    evaluation, ranks = evaluate.evaluate_run(config, finished, Tokens(shop.store), 1)
    items_T, offsets_U = shop.store.items_T, shop.store.offsets_U
    was_seen_N = np.array(
        [items_T[end - 1] in items_T[start : end - 1] for start, end in pairwise(offsets_U)]
    )
    assert was_seen_N.any()
    for name in evaluation["rows"]:
        is_last_N = ranks[name].to_numpy() == shop.catalogue.num_rows
        assert is_last_N[was_seen_N].all() == filter_seen
        assert not is_last_N[~was_seen_N].any()


def test_lists_are_described_by_category_and_exposure(evaluated):
    evaluation, _ = evaluated
    for row in evaluation["rows"].values():
        assert 0 <= row["gini@10"] < 1
        assert 0 < row["diversity@10"] <= 1


def test_the_table_fits_a_terminal(evaluated):
    evaluation, _ = evaluated
    lines = evaluation["table"].splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("| ") for line in lines) == 1 + len(evaluation["rows"])


def test_ranks_are_those_of_the_metrics(evaluated):
    evaluation, ranks = evaluated
    hits = np.mean(ranks["model"].to_numpy() <= 10)
    assert isclose(hits, evaluation["rows"]["model"]["HR@10"]["mean"])


def test_the_same_seed_evaluates_the_same(tmp_path, shop, evaluated):
    config = pipeline(tmp_path)
    again, ranks = evaluate.evaluate_run(config, open_run(config, None), Tokens(shop.store), 1)
    assert ranks.equals(evaluated[1])
    assert again["comparisons"] == evaluated[0]["comparisons"]


def test_a_sample_is_seeded_and_no_larger_than_asked(shop, tmp_path):
    config = pipeline(tmp_path, max_users=7)
    samples = [choose_targets(shop.store, SplitConfig(), shop.catalogue, config) for _ in range(2)]
    assert len(samples[0].users_N) == 7
    assert samples[0].users_N.tolist() == samples[1].users_N.tolist()
    assert (np.diff(samples[0].users_N) > 0).all()


CUT = SplitConfig(
    kind="temporal-cut",
    validation_from=datetime(2025, 10, 11, tzinfo=UTC),
    test_from=datetime(2025, 10, 13, tzinfo=UTC),
)


def test_the_split_is_the_one_that_trained(tmp_path, shop):
    config = pipeline(tmp_path, baselines=("popularity",))
    finished = write_run(config, shop, split=CUT)
    evaluation, _ = evaluate.evaluate_run(config, finished, Tokens(shop.store), 1)
    assert evaluation["protocol"]["kind"] == "temporal-cut"


def test_the_targets_are_those_that_trained(tmp_path, shop):
    config = pipeline(tmp_path, baselines=("popularity",), filter_seen=False)
    finished = write_run(config, shop, targets=TargetsConfig(event_types=["purchase"]))
    evaluation, ranks = evaluate.evaluate_run(config, finished, Tokens(shop.store), 1)
    assert evaluation["target_event_types"] == ["purchase"]
    field = shop.context.fields.index("event_type")
    code = 1 + shop.context.vocabularies["event_type"].index("purchase")
    store, last = shop.store, {}
    for user, (start, end) in enumerate(
        zip(store.offsets_U[:-1], store.offsets_U[1:], strict=True)
    ):
        bought = start + np.flatnonzero(store.context_TF[start:end, field] == code)
        if len(bought) >= 2 and bought[-2] > start:
            last[store.user_ids[user].as_py()] = store.items_T[bought[-1]]
    assert ranks["user_id"].to_pylist() == list(last)
    assert ranks["item_id"].equals(pa.chunked_array([shop.catalogue.decode(list(last.values()))]))


def test_a_run_that_recorded_no_targets_predicts_every_event(tmp_path, shop):
    config = pipeline(tmp_path)
    finished = write_run(config, shop)
    del finished.facts["config"]["train"]["targets"]
    assert finished.targets is None


def test_a_temporal_cut_says_its_dates_and_ranks_recent_popularity(tmp_path, shop):
    config = pipeline(tmp_path)
    finished = write_run(config, shop, split=CUT)
    evaluation, ranks = evaluate.evaluate_run(config, finished, Tokens(shop.store), 1)
    assert "training before 2025-10-11 00:00 UTC" in evaluation["table"]
    assert "test from 2025-10-13 00:00 UTC" in evaluation["table"]
    assert max(map(len, evaluation["table"].splitlines())) <= 100
    expected = rank_by_recent_popularity(shop)
    assert (
        dict(zip(ranks["user_id"].to_pylist(), ranks["recent-popularity"].to_pylist(), strict=True))
        == expected
    )
    hits = [rank <= 10 for rank in expected.values()]
    assert 0 < np.mean(hits) < 1
    assert evaluation["rows"]["recent-popularity"]["HR@10"]["mean"] == np.mean(hits)


def rank_by_recent_popularity(shop):
    """Ranks of the test targets of CUT, user by user, by the items of the seven days before."""
    store = shop.store
    days_T, hours_T = store.timestamps_T // 86_400_000_000, store.timestamps_T // 3_600_000_000
    first_day, test_day = (
        (moment - datetime(1970, 1, 1, tzinfo=UTC)).days
        for moment in (CUT.validation_from, CUT.test_from)
    )
    trained_I = np.bincount(store.items_T[days_T < first_day], minlength=42)
    ranks = {}
    for user, (start, end) in enumerate(pairwise(store.offsets_U.tolist())):
        target = start + int((days_T[start:end] < test_day).sum())
        if target in (start, end):
            continue
        is_recent_T = (hours_T < hours_T[target]) & (hours_T >= hours_T[target] - 7 * 24)
        # Without padding and mask; equal ones in the order of training, and then against us.
        counts_I = np.bincount(store.items_T[is_recent_T], minlength=42)[2:]
        scores_I = np.float32(counts_I + trained_I[2:] / (trained_I.max() + 1))
        scores_I[store.items_T[start:target] - 2] = -1
        item = store.items_T[target] - 2
        is_seen = scores_I[item] < 0
        ranks[store.user_ids[user].as_py()] = (
            42 if is_seen else int((scores_I >= scores_I[item]).sum())
        )
    return ranks


@pytest.fixture
def rival(tmp_path, shop):
    """An evaluated run r0 of the same shop."""
    config = pipeline(tmp_path, baselines=("popularity",))
    finished = write_run(config, shop, "r0")
    return finished, evaluate.evaluate_run(config, finished, Tokens(shop.store), 1)


def evaluate_against(rival, config, shop):
    finished, (evaluation, ranks) = rival
    (finished.folder / "evaluation.json").write_text(json.dumps(evaluation))
    pq.write_table(ranks, finished.folder / "ranks.parquet")
    run = write_run(config, shop)
    opened = evaluate.open_rival(config)
    return evaluate.evaluate_run(config, run, Tokens(shop.store), 1, opened)[0]


def test_a_run_is_compared_with_another_user_by_user(tmp_path, shop, rival):
    # r0 had every target one place lower, and its users in another order.
    finished, (evaluation, ranks) = rival
    lower = pa.array(ranks["model"].to_numpy() + 1)
    ranks = ranks.set_column(ranks.schema.get_field_index("model"), "model", lower)
    ranks = ranks.take(np.random.default_rng(0).permutation(len(ranks)))
    config = pipeline(tmp_path, baselines=("popularity",), against="r0")
    found = evaluate_against((finished, (evaluation, ranks)), config, shop)["against"]
    assert (found["run"], found["recipe"]) == ("r0", "bert4rec")
    assert found["rows"]["model"]["MRR@20"]["difference_low"] > 0
    assert found["rows"]["model, time-blind"]["MRR@20"]["difference"] == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_users": 7}, r"7 users are ranked against 30, and 7 of them are the same"),
        ({"filter_seen": False}, "filter_seen is False against True"),
    ],
)
def test_a_run_that_ranked_something_else_is_no_rival(tmp_path, shop, rival, options, reason):
    config = pipeline(tmp_path, baselines=("popularity",), against="r0", **options)
    with pytest.raises(JobError, match=f"r1 cannot be compared with r0: {reason}; evaluate both"):
        evaluate_against(rival, config, shop)


def test_a_rival_of_another_split_is_refused_before_anything_is_ranked(
    tmp_path, shop, rival, monkeypatch
):
    monkeypatch.setattr("ray_jobs.evaluate._measure_models", pytest.fail)
    finished, (evaluation, ranks) = rival
    others = ranks.set_column(1, "item_id", ranks["item_id"].take(np.arange(len(ranks))[::-1]))
    config = pipeline(tmp_path, against="r0")
    with pytest.raises(JobError, match="of the 30 users stand before another item"):
        evaluate_against((finished, (evaluation, others)), config, shop)


def test_a_rival_that_was_not_evaluated_is_named(tmp_path, shop):
    config = pipeline(tmp_path, against="r0")
    write_run(config, shop, "r0")
    with pytest.raises(JobError, match="r0 was not evaluated; run ray_jobs"):
        evaluate.open_rival(config)


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("train.recipe=sasrec", "train.recipe=sasrec"),
        ("storage.options.AWS_SECRET_ACCESS_KEY=x", "'storage.options.AWS_SECRET_ACCESS_KEY=***'"),
        ('storage.options={KEY="x"}', "'storage.options=***'"),
        ('--set=storage={options={KEY="x"}}', "'--set=storage=***'"),
    ],
)
def test_the_command_is_kept_without_secrets(argument, shown):
    argv = ["/usr/bin/python3", "-m", "ray_jobs.evaluate", "--set", argument]
    assert evaluate.describe_command(argv) == f"python -m ray_jobs.evaluate --set {shown}"


def test_ease_is_left_out_of_a_large_catalogue_and_named(tmp_path, shop, monkeypatch):
    monkeypatch.setattr("ray_jobs.evaluate.EASE.max_items", 39)
    config = pipeline(tmp_path, baselines=("popularity", "ease"))
    evaluation, _ = evaluate.evaluate_run(config, write_run(config, shop), Tokens(shop.store), 1)
    assert "ease" not in evaluation["rows"]
    assert evaluation["skipped_baselines"] == {"ease": "40 items; it stops at 39"}


def test_baselines_are_tuned_on_validation_targets(tmp_path, shop):
    names = ("popularity", "covisitation", "ease")
    config = pipeline(tmp_path, baselines=names, tuned=("covisitation", "als"))
    evaluation, _ = evaluate.evaluate_run(config, write_run(config, shop), Tokens(shop.store), 1)
    split = leave_one_out(shop.store.offsets_U)
    users = np.flatnonzero(split.validation_U >= 0)
    data = shop.store, split, shop.catalogue.num_rows
    trials = try_settings("covisitation", *data, users)
    chosen = choose_settings(trials)
    assert evaluation["baseline_settings"] == {"covisitation": chosen}
    assert evaluation["baseline_trials"] == {"covisitation": [one._asdict() for one in trials]}
    test_users = np.flatnonzero(split.test_U >= 0)
    targets = test_users, split.test_U[test_users]
    for name, baseline in (("covisitation", Covisitation(**chosen)), ("ease", EASE())):
        ranks_N = rank_targets(baseline.fit(*data), shop.store, *targets).ranks_N
        found = evaluation["rows"][name]["NDCG@10"]["mean"]
        assert found == pytest.approx(mean_accuracy(ranks_N)["NDCG@10"])


def test_covisitation_is_tuned_for_the_fallback_where_it_is_not_compared(tmp_path, shop):
    for tuned in (("covisitation", "als"), ()):
        config = pipeline(tmp_path, baselines=("popularity",), tuned=tuned)
        run = write_run(config, shop)
        evaluation, _ = evaluate.evaluate_run(config, run, Tokens(shop.store), 1)
        assert evaluation["baseline_settings"].keys() == {"covisitation"} & set(tuned)
        assert "covisitation" not in evaluation["rows"]


def test_settings_that_are_not_there_cannot_be_chosen(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluate\.tuned: there is no popularity; choose"):
        evaluate.run(pipeline(tmp_path, tuned=("popularity",)))


def test_no_test_event_is_an_error(shop, tmp_path):
    late = SplitConfig(
        kind="temporal-cut",
        validation_from=datetime(2030, 1, 1, tzinfo=UTC),
        test_from=datetime(2030, 1, 2, tzinfo=UTC),
    )
    with pytest.raises(JobError, match="No user has a test event under the temporal-cut split"):
        choose_targets(shop.store, late, shop.catalogue, pipeline(tmp_path))


def test_an_unknown_baseline_is_named_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match="there is no magic; choose of: popularity"):
        evaluate.run(pipeline(tmp_path, baselines=("popularity", "magic")))


@pytest.mark.ray
def test_the_job_writes_its_files_into_the_run(tmp_path, shop, ray_cluster):
    config = pipeline(tmp_path, max_users=20)
    write_sequences(config, shop)
    finished = write_run(config, shop)
    report = evaluate.run(config)
    evaluation = finished.evaluation()
    assert report.figures["users"] == evaluation["num_users"] == 20
    assert report.figures["ndcg10"] == evaluation["rows"]["model"]["NDCG@10"]["mean"]
    assert report.figures["beats_all_baselines"] in (True, False)
    assert report.figures["best_baseline"] in evaluation["comparisons"]
    assert pq.read_table(finished.folder / "ranks.parquet").num_rows == 20
    assert report.figures["report"] == str(finished.folder / "report.html")
    text = (finished.folder / "report.md").read_text()
    assert evaluation["targets_sha256"] in text
    assert (finished.folder / "plots" / "rows.svg").exists()


@pytest.mark.ray
def test_the_job_compares_two_runs(tmp_path, shop, ray_cluster):
    config = pipeline(tmp_path, baselines=("popularity",))
    write_sequences(config, shop)
    write_run(config, shop, "r0")
    evaluate.run(config)
    write_run(config, shop, "r1")
    report = evaluate.run(pipeline(tmp_path, baselines=("popularity",), against="r0"))
    assert report.figures["against"] == "r0"
    assert report.figures["difference"] == 0
    text = (Path(config.storage.runs_uri) / "r1" / "report.md").read_text()
    assert "## Against the run r0" in text


@pytest.mark.ray
def test_an_error_on_the_worker_arrives_as_its_one_sentence(tmp_path, shop, ray_cluster):
    late = SplitConfig(
        kind="temporal-cut",
        validation_from=datetime(2030, 1, 1, tzinfo=UTC),
        test_from=datetime(2030, 1, 2, tzinfo=UTC),
    )
    config = pipeline(tmp_path)
    write_sequences(config, shop)
    write_run(config, shop, split=late)
    with pytest.raises(JobError) as caught:
        evaluate.run(config)
    assert str(caught.value).startswith("No user has a test event")
    assert "\n" not in str(caught.value)


def write_sequences(config, shop):
    """The shop's sequences as a Delta table of two buckets."""
    lake = config.storage.lake_uri
    schema = sequences_schema("string", "string")
    table = create_table(lake, "sequences", schema, num_buckets=2)
    store = shop.store
    bounds = list(zip(store.offsets_U[:-1], store.offsets_U[1:], strict=True))
    item_ids = shop.catalogue.decode(store.items_T).to_pylist()
    rows = [
        {
            "user_id": store.user_ids[user].as_py(),
            "segment": "new",
            "item_ids": item_ids[start:end],
            "event_types": ["view"] * (end - start),
            "timestamps": store.timestamps_T[start:end].tolist(),
            "devices": ["mobile"] * (end - start),
            "user_bucket": user % 2,
        }
        for user, (start, end) in enumerate(bounds)
    ]
    parts = [
        write_part(lake, "sequences", pa.Table.from_pylist(rows[bucket::2], schema), bucket)
        for bucket in (0, 1)
    ]
    commit_parts(table, parts)

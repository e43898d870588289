"""The leader board: what is trained, resumed, kept and shown."""

import json
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import leaderboard, published
from benchmarks.leaderboard import (
    RESULTS,
    compare_trainings,
    make_trainer,
    measure_baselines,
    measure_lifts,
    read_results,
    train,
)
from benchmarks.leaderboard_rows import Entry, read_entries
from benchmarks.leaderboard_table import render
from benchmarks.published import Events
from ray_jobs.code_version import code_version
from ray_jobs.job import load_config
from recsys.context import NO_TIME
from recsys.item_codes import ItemCodesConfig, learn_codes
from recsys.recipe import read_recipe

_ENTRY = Entry(
    dataset="circle",
    recipe="sasrec-ce",
    max_epochs=3,
    published="0.5 / 0.5, somebody",
    overrides={"batch_size": 8, "model": {"dim": 16, "max_len": 8}},
)


def _id(result):
    return f"{result['row']}-{result['seed']}"


@pytest.fixture
def circle(monkeypatch, tmp_path):
    """Ten items in a circle, 40 users who walk along it; results and checkpoints in `tmp_path`."""
    users = np.repeat(np.arange(40), 6)
    items = (users * 3 + np.tile(np.arange(6), 40)) % 10
    events = Events(users, items, np.full(len(users), NO_TIME))
    monkeypatch.setattr(published, "DATASETS", {"circle": lambda: events})
    monkeypatch.setattr(leaderboard, "DATASETS", {"circle": lambda: events})
    monkeypatch.setattr(leaderboard, "read_entries", lambda: {"circle-ce": _ENTRY})
    monkeypatch.setattr(leaderboard, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("NEXTITEM_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """A folder with a small file of each format, of 30 users with 8 events on 20 items each."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("ml-1m", "beauty", "globo"):
        (folder / name).mkdir()
    users, places = np.repeat(np.arange(1, 31), 8), np.tile(np.arange(8), 30)
    items = (users * 3 + places) % 20 + 1
    events = list(zip(users.tolist(), items.tolist(), places.tolist(), strict=True))
    pairs = "".join(f"{user} {item}\n" for user, item, _ in events)
    (folder / "ml-1m/ml-1m.txt").write_text(pairs)
    ratings = "".join(f"{user}::{item}::4::{1000 * place}\n" for user, item, place in events)
    (folder / "ml-1m/ratings.dat").write_text(ratings)
    ages = "".join(f"{user}::F::{user % 3}::1::1\n" for user in range(1, 31))
    (folder / "ml-1m/users.dat").write_text(ages)
    lists = (" ".join(map(str, [user, *row])) for user, row in enumerate(items.reshape(30, 8), 1))
    (folder / "beauty/Beauty.txt").write_text("\n".join(lists) + "\n")
    attributes = {str(item): [item % 4, 5] for item in range(1, 21)}
    (folder / "beauty/Beauty_item2attributes.json").write_text(json.dumps(attributes))
    clicks = {"user_id": users, "click_article_id": items, "click_timestamp": 1000 * places}
    codes = ("click_deviceGroup", "click_region", "click_referrer_type")
    pq.write_table(
        pa.table(clicks | {name: users % 3 for name in codes}), folder / "globo/clicks.parquet"
    )
    return folder


@pytest.fixture(scope="module")
def small_shop():
    return published.DATASETS["small-shop"]()


@pytest.mark.parametrize(("name", "entry"), sorted(read_entries().items()))
def test_every_row_fits_its_recipe_and_data(name, entry, small_data, small_shop, monkeypatch):
    monkeypatch.setenv("NEXTITEM_DATA", str(small_data))
    shops = {shop: lambda: small_shop for shop in published.DATASETS if "shop" in shop}
    monkeypatch.setattr(published, "DATASETS", {**published.DATASETS, **shops})
    dataset = published.read_dataset(entry.dataset, entry.context, entry.cut, entry.cut_target)
    assert (dataset.split.validation_U >= 0).any()
    assert (dataset.split.test_U >= 0).any()
    # Every field that the row names says something about some event.
    assert dataset.context.fields == entry.context.fields
    assert dataset.store.context_TF.any(axis=0).all()
    for attribute in entry.attributes.fields:
        assert attribute in dataset.catalogue.table.column_names

    trainer = make_trainer(entry, dataset, seed=1)
    assert trainer.recipe.name == entry.recipe
    assert (trainer.recipe.model.item_codes is not None) == ("recjpq" in name)


@pytest.mark.parametrize(("name", "entry"), sorted(read_entries().items()))
def test_the_aim_of_a_row_is_not_below_its_floor(name, entry):
    assert (entry.floor is None) == (entry.aim is None), name
    if entry.floor and entry.aim:
        for floor, aim in zip(entry.floor, entry.aim, strict=True):
            assert 0 < floor <= aim < 1
        # A single hit is worth at most 1 in NDCG.
        assert entry.floor[1] < entry.floor[0]
        assert entry.aim[1] < entry.aim[0]


@pytest.mark.parametrize("result", [one for one in read_results() if "seed" in one], ids=_id)
def test_results_have_the_settings_of_their_rows(result):
    trained = Entry.model_validate(result["entry"]).settings
    row = read_entries()[result["row"]].settings
    # Fewer users than that were there.
    assert result["num_users"] <= min(trained.pop("max_users"), row.pop("max_users"))
    assert trained == row


def test_the_leader_board_is_what_the_results_say():
    text = RESULTS.with_suffix(".md").read_text()
    assert text == render(read_results(), read_entries()), "python -m benchmarks.leaderboard table"


def test_lifts_belong_to_the_results():
    found = read_results()
    trained = {(one["row"], one["seed"]): one["test"]["model"] for one in found if "seed" in one}
    baselines = {one["targets_sha256"]: one["test"] for one in found if "baselines" in one}
    for lift in (one for one in found if "lift_of" in one):
        for name, facts in lift["over"].items():
            tests = [trained[lift["lift_of"], seed]["HR@10"] for seed in lift["seeds"]]
            ours = np.mean([test["mean"] for test in tests])
            theirs = baselines[lift["targets_sha256"]][name]["HR@10"]["mean"]
            assert facts["HR@10"]["difference"] == pytest.approx(ours - theirs)


def test_nothing_that_reads_globo_reads_gaps():
    entries = [entry for entry in read_entries().values() if entry.dataset == "globo"]
    assert len(entries) >= 4
    job = load_config("globo").train
    for context in (job.context, *(entry.context for entry in entries)):
        assert "gap" not in context.time
    recipes = [read_recipe(one.recipe, one.overrides) for one in (job, *entries)]
    assert not any(recipe.model.time_bias for recipe in recipes)


def test_what_a_training_found_is_kept(circle):
    found = train("circle-ce", seed=1, threads=1)
    kept = json.loads((circle / "results/circle-ce-1.json").read_text())
    assert kept["test"] == found["test"]
    assert kept["num_users"] == 40
    assert len(kept["history"]) == kept["epochs"] == 3
    assert len(kept["targets_sha256"]) == 64
    assert kept["code_version"] == code_version()


def test_a_training_prints_what_its_targets_hash_to(circle, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["leaderboard", "train", "circle-ce", "--threads", "1"])
    leaderboard.main()
    kept = json.loads((circle / "results/circle-ce-1.json").read_text())
    assert json.loads(capsys.readouterr().out)["targets_sha256"] == kept["targets_sha256"]


@pytest.mark.usefixtures("circle")
def test_a_row_with_item_codes_learns_them_from_what_trains():
    codes = ItemCodesConfig(length=4, num_values=4)
    sizes = {"dim": 16, "max_len": 8, "item_codes": codes.model_dump()}
    entry = _ENTRY.model_copy(update={"overrides": {"batch_size": 8, "model": sizes}})
    dataset = published.read_dataset("circle")
    trainer = make_trainer(entry, dataset, seed=3)
    expected = learn_codes(codes, dataset.store, dataset.split, dataset.catalogue, seed=3)
    assert np.array_equal(trainer.model.items.codes.numpy(), expected)


def test_a_training_that_was_cut_off_ends_where_an_unbroken_one_ends(circle, monkeypatch):
    whole = train("circle-ce", seed=1, threads=1)
    monkeypatch.setenv("NEXTITEM_HOME", str(circle / "elsewhere"))
    first = leaderboard.Trainer.train_epoch
    calls = []

    def dies_in_the_second_epoch(trainer):
        calls.append(trainer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return first(trainer)

    monkeypatch.setattr(leaderboard.Trainer, "train_epoch", dies_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        train("circle-ce", seed=1, threads=1)
    again = train("circle-ce", seed=1, threads=1)
    assert len(calls) == 4
    assert again["test"] == whole["test"]
    assert [epoch["loss"] for epoch in again["history"]] == [
        epoch["loss"] for epoch in whole["history"]
    ]


@pytest.mark.usefixtures("circle")
def test_two_rows_are_compared_user_by_user(monkeypatch):
    entries = {"one": _ENTRY, "two": _ENTRY.model_copy(update={"max_epochs": 1})}
    monkeypatch.setattr(leaderboard, "read_entries", lambda: entries)
    one, two = (train(name, seed=1, threads=1)["test"]["model"]["HR@10"] for name in entries)
    found = compare_trainings("one", "two", seed=1)
    assert found["HR@10"]["difference"] == pytest.approx(one["mean"] - two["mean"])


@pytest.mark.usefixtures("circle")
def test_rows_of_other_targets_are_not_compared(circle):
    for name, sha256 in (("one", "a"), ("two", "b")):
        path = circle / f"results/{name}-1.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"targets_sha256": sha256}))
    with pytest.raises(ValueError, match="one and two rank other test targets"):
        compare_trainings("one", "two", seed=1)


@pytest.mark.usefixtures("circle")
def test_the_table_shows_means_over_seeds_and_what_was_published():
    found = [train("circle-ce", seed=seed, threads=1) for seed in (1, 2)]
    found.append(measure_baselines("circle", None))
    text = render(found, {"circle-ce": _ENTRY})
    mean = np.mean([result["test"]["model"]["NDCG@10"]["mean"] for result in found[:2]])
    (row,) = [line for line in text.splitlines() if line.startswith("| circle-ce | sasrec-ce")]
    assert f"| {mean:.4f} ±" in row
    assert "| 16/2/1/8 |" in row
    assert "0.5 / 0.5, somebody" in row
    assert "| | covisitation |" in text
    assert "recent-popularity" not in text.split("## circle")[1]  # the file has no times
    assert found[0]["targets_sha256"] in text
    assert "- circle-ce: `sasrec-ce` with `batch_size = 8`, `model.dim = 16`" in text
    for seed in (1, 2):
        assert f"python -m benchmarks.leaderboard train circle-ce --seed {seed}\n" in text
    assert "Not trained yet" not in text


def test_marked_targets_have_figures_of_their_own(circle, monkeypatch):
    events = published.DATASETS["circle"]()
    odd = replace(events, marks={"odd users": events.users_T % 2 == 1})
    monkeypatch.setattr(published, "DATASETS", {"circle": lambda: odd})
    found = [train("circle-ce", seed=1, threads=1), measure_baselines("circle", None)]
    ranks_N = np.load(circle / "home/leaderboard/circle-ce-1/ranks.npy")
    part = found[0]["slices"]["odd users"]
    assert part["num_users"] == 20
    mean = np.mean(1 / np.log2(1 + ranks_N[1::2]))  # none is beyond 10
    assert part["test"]["model"]["NDCG@10"]["mean"] == pytest.approx(mean)
    assert mean != pytest.approx(found[0]["test"]["model"]["NDCG@10"]["mean"])

    text = render(found, {"circle-ce": _ENTRY}).split("On the 20 targets with odd users alone")[1]
    (row,) = [line for line in text.splitlines() if line.startswith("| circle-ce |")][:1]
    assert f"| {mean:.4f} ±" in row
    ease = found[1]["slices"]["odd users"]["test"]["ease"]["NDCG@10"]["mean"]
    (row,) = [line for line in text.splitlines() if line.startswith("| ease |")]
    assert f"| {ease:.4f} ±" in row


@pytest.mark.usefixtures("circle")
def test_the_table_says_which_goals_are_reached():
    found = train("circle-ce", seed=1, threads=1)
    hit_rate, ndcg = (found["test"]["model"][metric]["mean"] for metric in ("HR@10", "NDCG@10"))
    goals = {"floor": (hit_rate, ndcg), "aim": (hit_rate, ndcg + 1e-9)}
    text = render([found], {"circle-ce": _ENTRY.model_copy(update=goals)})
    pair = f"{hit_rate:.3f} / {ndcg:.3f}"
    assert f"| {pair} ✓ | {pair} ✗ | 1 |" in text


@pytest.mark.usefixtures("circle")
def test_rows_without_a_result_are_listed():
    found = train("circle-ce", seed=1, threads=1)
    later = _ENTRY.model_copy(update={"cut": (0.5, 0.75), "floor": (0.3, 0.2)})
    last = later.model_copy(update={"cut_target": "last"})
    rows = {"circle-ce": _ENTRY, "later": later, "last": last}
    text = render([found], rows).split("## Not trained yet")[1]
    assert "| later | sasrec-ce | circle, temporal cut at 50% and 75% | 0.300 / 0.200 |" in text
    assert "| last | sasrec-ce | circle, temporal cut at 50% and 75%, last targets |" in text
    assert "train later --seed 1" in text
    assert "circle-ce" not in text


def test_rows_are_paired_with_baselines_whose_ranks_are_there(circle):
    results = [train("circle-ce", seed=seed, threads=1) for seed in (1, 2)]
    baselines = measure_baselines("circle", None)
    assert measure_lifts() == ["circle-ce"]
    kept = json.loads((circle / "results/lift-circle-ce.json").read_text())
    assert kept["seeds"] == [1, 2]
    assert set(kept["over"]) == set(baselines["test"])
    ours = np.mean([result["test"]["model"]["HR@10"]["mean"] for result in results])
    theirs = baselines["test"]["ease"]["HR@10"]["mean"]
    assert kept["over"]["ease"]["HR@10"]["lift"] == pytest.approx(ours / theirs - 1)

    text = render(read_results(), {"circle-ce": _ENTRY})
    filtering = {
        name: baselines["test"][name]["NDCG@10"]["mean"] for name in ("item-knn", "als", "ease")
    }
    best = max(filtering, key=filtering.get)
    facts = kept["over"][best]["NDCG@10"]
    assert f"Lift over {best}, the best collaborative filtering here" in text
    assert f"{facts['lift']:+.1%} [{facts['lift_low']:+.1%}, {facts['lift_high']:+.1%}]" in text


def test_ranks_of_another_run_are_not_compared(circle):
    train("circle-ce", seed=1, threads=1)
    measure_baselines("circle", None)
    np.save(circle / "home/leaderboard/circle-ce-1/ranks.npy", np.full(40, 9))
    assert measure_lifts() == []
    text = render(read_results(), {"circle-ce": _ENTRY})
    (lift,) = [
        line for line in text.splitlines() if line.startswith("| circle-ce | ") and "%" in line
    ]
    assert "[" not in lift

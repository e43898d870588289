"""The leader board: what is trained, resumed, kept and shown."""

import json

import numpy as np
import pytest

from benchmarks import leaderboard, published
from benchmarks.leaderboard import (
    Entry,
    compare_trainings,
    make_trainer,
    measure_baselines,
    read_entries,
    render,
    train,
)
from benchmarks.published import Events
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


@pytest.mark.parametrize("name", sorted(read_entries()))
def test_every_row_fits_its_recipe_and_data(name):
    entry = read_entries()[name]
    assert read_recipe(entry.recipe, entry.overrides).name == entry.recipe
    assert entry.dataset in published.DATASETS


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
    text = render(found)
    mean = np.mean([result["test"]["model"]["NDCG@10"]["mean"] for result in found[:2]])
    (row,) = [line for line in text.splitlines() if line.startswith("| circle-ce | sasrec-ce")]
    assert f"| {mean:.4f} ±" in row
    assert "| 16/2/1/8 |" in row
    assert "0.5 / 0.5, somebody" in row
    assert "| | covisitation |" in text
    assert "recent-popularity" not in text  # the file has no times
    assert found[0]["targets_sha256"] in text

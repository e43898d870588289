"""The leader board: what is trained, resumed, kept and shown."""

import itertools
import json
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from benchmarks import (
    leaderboard,
    leaderboard_baselines,
    leaderboard_files,
    leaderboard_table,
    published,
)
from benchmarks.leaderboard import make_trainer, measure_again, train
from benchmarks.leaderboard_baselines import measure_baselines
from benchmarks.leaderboard_files import MODEL, RESULTS, TIME_BLIND, read_results
from benchmarks.leaderboard_pairs import compare_trainings, measure_lifts, measure_requests
from benchmarks.leaderboard_rows import Entry, Goal, read_entries
from benchmarks.leaderboard_table import render
from benchmarks.published import Events
from ray_jobs.code_version import code_version
from ray_jobs.job import load_config
from recsys import baseline_search, baselines
from recsys.baseline_search import GRIDS
from recsys.catalogue import NUM_SPECIAL
from recsys.checkpoint import load_checkpoint
from recsys.context import NO_TIME, ContextConfig
from recsys.errors import CheckpointError
from recsys.evaluation import rank_targets
from recsys.item_codes import ItemCodesConfig, learn_codes
from recsys.recipe import Recipe, read_recipe
from recsys.scorer import ModelScorer
from recsys.validation import sample_users

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
    monkeypatch.setattr(leaderboard_files, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("NEXTITEM_HOME", str(tmp_path / "home"))
    return tmp_path


def _offer(monkeypatch, entry, users, items, **columns):
    """Events without times, in place of the circle, and the one row that reads them."""
    events = Events(users, items, np.full(len(users), NO_TIME), columns)
    monkeypatch.setattr(published, "DATASETS", {entry.dataset: lambda: events})
    monkeypatch.setattr(leaderboard, "read_entries", lambda: {entry.dataset: entry})


@pytest.fixture
def paths(circle, monkeypatch):
    """Ten places in a circle; a user takes the even item of the next one on a phone, the odd one on
    a desktop, and the device says which.
    """
    users, steps = np.repeat(np.arange(60), 8), np.tile(np.arange(8), 60)
    is_phone = np.random.default_rng(0).random(len(users)) < 0.5
    items = (users + steps) % 10 * 2 + ~is_phone
    entry = _ENTRY.model_copy(
        update={
            "dataset": "paths",
            "context": ContextConfig(categorical=("device",), time=()),
            "overrides": _ENTRY.overrides | {"optimiser": {"learning_rate": 1e-2}},
        }
    )
    devices = pa.array(np.where(is_phone, "phone", "desktop"))
    _offer(monkeypatch, entry, users, items, device=devices)
    return circle


def _rank(entry, checkpoint, seed=1, **options):
    """Ranks of the test targets under the weights of a checkpoint."""
    dataset = published.read_dataset(entry.dataset, entry.context)
    trainer = make_trainer(entry, dataset, seed)
    load_checkpoint(checkpoint, trainer)
    scorer = ModelScorer(trainer.model, dataset.context.known_at_request_F, **options)
    users = sample_users(dataset.split.test_U, entry.max_users, seed=0)
    return rank_targets(scorer, dataset.store, users, dataset.split.test_U[users]).ranks_N


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
    assert (entry.floor is None) == (not entry.aim), name
    goals = [entry.floor, *entry.aim] if entry.floor else []
    for lower, higher in itertools.pairwise(goals):
        assert all(0 < low <= high < 1 for low, high in zip(lower, higher, strict=True))
    # A single hit is worth at most 1 in NDCG.
    assert all(ndcg < hit_rate for hit_rate, ndcg in goals)


def test_an_aim_is_a_pair_or_several_steps():
    row = {"dataset": "circle", "recipe": "bert4rec", "max_epochs": 1}
    assert Entry.model_validate(row).aim == ()
    assert Entry.model_validate(row | {"aim": None}).aim == ()
    assert Entry.model_validate(row | {"aim": [0.3, 0.2]}).aim == ((0.3, 0.2),)
    steps = [[0.292, 0.162], [0.309, 0.170]]
    assert Entry.model_validate(row | {"aim": steps}).aim == ((0.292, 0.162), (0.309, 0.170))
    with pytest.raises(ValidationError, match="aim"):
        Entry.model_validate(row | {"aim": [0.3]})


@pytest.mark.parametrize("result", [one for one in read_results() if "seed" in one], ids=_id)
def test_results_have_the_settings_of_their_rows(result):
    trained = Entry.model_validate(result["entry"]).settings
    row = read_entries()[result["row"]].settings
    # Fewer users than that were there.
    assert result["num_users"] <= min(trained.pop("max_users"), row.pop("max_users"))
    assert trained == row
    recipe = read_recipe(row["recipe"], row["overrides"])
    assert _recorded_recipe(result) == recipe.model_dump(mode="json")


def _recorded_recipe(result):
    """What was added to recipes since is at its defaults."""
    return _filled(result["recipe"], Recipe(name=result["recipe"]["name"]).model_dump(mode="json"))


def _filled(recorded, defaults):
    both = {name for name, value in recorded.items() if isinstance(value, dict)}
    parts = {name: _filled(recorded[name], defaults.get(name) or {}) for name in both}
    return defaults | recorded | parts


def test_a_recorded_recipe_lacks_nothing_but_defaults():
    recipe = read_recipe("gsasrec", {"loss": {"calibration": 0.5}}).model_dump(mode="json")
    older = recipe | {"loss": {**recipe["loss"]}}
    del older["loss"]["prior"]
    assert _recorded_recipe({"recipe": older}) == recipe
    del older["loss"]["calibration"]
    assert _recorded_recipe({"recipe": older}) != recipe
    assert _recorded_recipe({"recipe": recipe | {"batch_size": 7}}) != recipe


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


def test_what_the_request_is_worth_belongs_to_the_results():
    found = read_results()
    trained = {(one["row"], one["seed"]): one["test"] for one in found if "seed" in one}
    for told in (one for one in found if "told_of_request" in one):
        tests = [trained[told["told_of_request"], seed] for seed in told["seeds"]]
        for metric in ("HR@10", "NDCG@10"):
            gains = [
                test[MODEL][metric]["mean"] - test[TIME_BLIND][metric]["mean"] for test in tests
            ]
            assert told[metric]["difference"] == pytest.approx(np.mean(gains))


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
    assert kept["precision"] in ("float32", "bfloat16")


def test_the_table_says_in_which_numbers_a_training_counted(circle):
    found = train("circle-ce", seed=1, threads=1)
    shown = {
        precision: render([found | {"precision": precision}], {"circle-ce": _ENTRY})
        for precision in ("float32", "bfloat16")
    }
    assert "min, 1 thread, fp32 |" in shown["float32"]
    assert "min, 1 thread, bf16 |" in shown["bfloat16"]


def test_the_test_targets_are_ranked_with_the_best_weights_not_the_last(circle, monkeypatch):
    """Validation targets never train, so that they sink, the more so the longer one trains."""
    walk = (np.arange(60)[:, None] * 3 + np.arange(6)) % 30
    walk[:, 4] = 30 + np.arange(60) % 10
    overrides = _ENTRY.overrides | {"optimiser": {"learning_rate": 1e-2}}
    entry = _ENTRY.model_copy(update={"max_epochs": 6, "overrides": overrides})
    _offer(monkeypatch, entry, np.repeat(np.arange(60), 6), walk.reshape(-1))

    found = train("circle", seed=1, threads=1)
    assert found["best_epoch"] < found["epochs"] == 6
    folder = circle / "home/leaderboard/circle-1"
    best_N, last_N = (_rank(entry, folder / kind) for kind in ("best", "last"))
    assert np.array_equal(np.load(folder / "ranks.npy"), best_N)
    best, last = (np.mean(1 / ranks_N * (ranks_N <= 10)) for ranks_N in (best_N, last_N))
    assert found["test"]["model"]["MRR@10"]["mean"] == pytest.approx(best)
    assert best != pytest.approx(last)


@pytest.mark.usefixtures("circle")
def test_test_targets_are_ranked_without_what_their_user_has_seen(monkeypatch):
    # Training has 1 in 11 events, 2 in 9, 3 in 3, 4 in 2, and 5 in none.
    items = [1, 2, 3, 5] * 8 + [1, 2] + [3, 4] * 2 + [1, 3] + [1]
    users = [user for user in range(8) for _ in range(4)] + [8, 8, 9, 9, 10, 10, 11, 11, 12]
    _offer(monkeypatch, _ENTRY, np.array(users), np.array(items))
    found = measure_baselines("circle", None)
    assert found["num_users"] == 8
    # The target is 5; of 4 and 5, which are left, 4 has more events. With what was seen it would be
    # the fifth of all; the validation target, 3, would be the first of 3, 4 and 5.
    assert found["test"]["popularity"]["MRR@10"]["mean"] == pytest.approx(1 / 2)


class _Constant:
    """Ranks one item first, for everybody."""

    name = "constant"

    def __init__(self, *, item=1):
        self.item = item

    def fit(self, store, split, num_rows):
        self.num_rows = num_rows
        return self

    def score(self, store, users_B, targets_B):
        scores_BI = torch.zeros(len(users_B), self.num_rows)
        scores_BI[:, :NUM_SPECIAL] = -torch.inf
        scores_BI[:, NUM_SPECIAL + self.item - 1] = 1
        return scores_BI


@pytest.mark.usefixtures("circle")
def test_baselines_are_tuned_on_validation_targets(monkeypatch):
    # Everybody is validated with 5 and tested with 6.
    items = [[1, 2, 5, 6], [3, 4, 5, 6], [1, 4, 5, 6]] * 3
    _offer(monkeypatch, _ENTRY, np.repeat(np.arange(9), 4), np.ravel(items))
    for module in (baselines, baseline_search, leaderboard_baselines):
        monkeypatch.setattr(module, "BASELINES", {"constant": _Constant})
    monkeypatch.setattr(baseline_search, "GRIDS", {"constant": {"item": (4, 5, 6)}})
    found = measure_baselines("circle")
    assert [run["settings"] for run in found["tried"]["constant"]] == [
        {"item": 4},
        {"item": 5},
        {"item": 6},
    ]
    assert found["settings"] == {"constant": {"item": 5}}
    # 5 was seen by then, and ties count against us: 6 comes after 1 to 4, of which two were seen.
    assert found["test"]["constant"]["MRR@10"]["mean"] == pytest.approx(1 / 3)

    untuned = measure_baselines("circle", is_tuned=False)
    assert untuned["settings"] == untuned["tried"] == {}


@pytest.mark.usefixtures("circle")
def test_the_table_names_the_settings_of_tuned_baselines(monkeypatch):
    found = train("circle-ce", seed=1, threads=1)
    tuned, untuned = (measure_baselines("circle", is_tuned=is_tuned) for is_tuned in (True, False))
    ridge = tuned["settings"]["ease"]["ridge"]
    assert ridge in GRIDS["ease"]["ridge"]
    text = render([found, tuned], {"circle-ce": _ENTRY})
    assert f"| | ease | ridge {ridge:g} | " in text
    assert "baselines circle\n" in text
    text = render([found, untuned], {"circle-ce": _ENTRY})
    assert "| | ease |  | " in text
    assert "baselines circle --untuned\n" in text


def test_the_time_blind_row_is_not_told_of_the_request(paths):
    found = train("paths", seed=1, threads=1)
    folder = paths / "home/leaderboard/paths-1"
    entry = leaderboard.read_entries()["paths"]
    blind_N = _rank(entry, folder / "best", knows_request=False)
    assert np.array_equal(np.load(folder / "ranks-time-blind.npy"), blind_N)
    assert np.array_equal(np.load(folder / "ranks.npy"), _rank(entry, folder / "best"))
    test = found["test"]
    assert test["time-blind"]["NDCG@10"]["mean"] < test["model"]["NDCG@10"]["mean"]


def test_being_told_of_the_request_is_compared_where_both_ranks_are_there(paths):
    found = [train("paths", seed=seed, threads=1) for seed in (1, 2)]
    assert measure_requests() == ["paths"]
    kept = json.loads((paths / "results/told-paths.json").read_text())
    assert kept["seeds"] == [1, 2]
    told, blind = (
        np.mean([one["test"][name]["NDCG@10"]["mean"] for one in found])
        for name in ("model", "time-blind")
    )
    assert kept["NDCG@10"]["lift"] == pytest.approx(told / blind - 1)

    text = render(read_results(), leaderboard.read_entries())
    line = "paths told of the request against the same weights not told, paired by user: HR@10 "
    (shown,) = [found for found in text.splitlines() if found.startswith(line)]
    facts = kept["NDCG@10"]
    interval = f"{facts['lift']:+.1%} [{facts['lift_low']:+.1%}, {facts['lift_high']:+.1%}]"
    assert shown.endswith(f", NDCG@10 {interval}.")


def test_seeds_without_both_ranks_are_not_compared(paths):
    for seed in (1, 2):
        train("paths", seed=seed, threads=1)
    folder = paths / "home/leaderboard"
    (folder / "paths-1/ranks-time-blind.npy").unlink()
    assert measure_requests() == ["paths"]
    text = render(read_results(), leaderboard.read_entries())
    (line,) = [found for found in text.splitlines() if "told of the request against" in found]
    assert line.endswith("], seed 2.")

    (paths / "results/told-paths.json").unlink()
    (folder / "paths-2/ranks-time-blind.npy").unlink()
    assert measure_requests() == []
    assert "told of the request against" not in render(read_results(), leaderboard.read_entries())


def test_a_row_that_reads_no_context_is_told_nothing(circle):
    train("circle-ce", seed=1, threads=1)
    assert measure_requests() == []
    assert not list((circle / "results").glob("told-*"))


def test_lists_and_kinds_of_targets_are_kept(paths):
    found = train("paths", seed=1, threads=1)
    assert set(found["lists"]) == {"model", "time-blind"}
    assert set(found["lists"]["model"]) == {"coverage@10", "gini@10", "novelty@10", "popularity@10"}
    # All 60 users have 7 events before the target, and each of the 20 items trains about 18 times.
    assert list(found["kinds"]["history_length"]) == ["5-9"]
    assert set(found["kinds"]) == {"history_length", "item_training_events", "device"}
    devices = found["kinds"]["device"]
    assert set(devices) == {"phone", "desktop"}
    is_phone_N = np.random.default_rng(0).random((60, 8))[:, 7] < 0.5
    blind_N = np.load(paths / "home/leaderboard/paths-1/ranks-time-blind.npy")
    for device, is_there_N in (("phone", is_phone_N), ("desktop", ~is_phone_N)):
        assert devices[device]["num_users"] == is_there_N.sum()
        mean = np.mean((1 / np.log2(1 + blind_N) * (blind_N <= 10))[is_there_N])
        assert devices[device]["test"]["time-blind"]["NDCG@10"]["mean"] == pytest.approx(mean)


@pytest.mark.usefixtures("paths")
def test_the_table_shows_lists_and_history_lengths_of_rows_that_have_them():
    found = train("paths", seed=1, threads=1)
    older = {key: value for key, value in found.items() if key not in ("lists", "kinds")}
    entries = leaderboard.read_entries()
    older |= {"row": "older"}
    text = render([found, older], entries | {"older": entries["paths"]})
    lists = text.split("Beyond accuracy:\n\n")[1].split("\n\n")[0].splitlines()
    assert lists[0] == "| row | coverage@10 | novelty@10 | popularity@10 | runs |"
    assert [line.split(" | ")[0] for line in lists[2:]] == ["| paths", "| paths; time-blind"]
    facts = found["lists"]["model"]
    expected = f"{facts['coverage@10']:.1%} | {facts['novelty@10']:.2f} bits"
    assert lists[2] == f"| paths | {expected} | {facts['popularity@10']:.3f} | 1 |"

    lengths = text.split("by history length:\n\n")[1].split("\n\n")[0].splitlines()
    assert lengths[0] == "| row | 5-9 events (60 users) |"
    assert lengths[2].startswith(f"| paths | {found['test']['model']['NDCG@10']['mean']:.4f} ± ")
    assert len(lengths) == 4
    alone = render([older], {"older": entries["paths"]})
    assert "Beyond accuracy:" not in alone
    assert "by history length:" not in alone


def test_a_training_is_measured_again_without_training(paths, monkeypatch):
    found = json.loads(json.dumps(train("paths", seed=1, threads=1)))
    kept, folder = paths / "results/paths-1.json", paths / "home/leaderboard/paths-1"
    older = {key: value for key, value in found.items() if key not in ("lists", "kinds")}
    kept.write_text(json.dumps(older))
    told_N, blind_N = (np.load(folder / name) for name in ("ranks.npy", "ranks-time-blind.npy"))
    (folder / "ranks-time-blind.npy").unlink()
    assert measure_requests() == []
    monkeypatch.setattr(leaderboard.Trainer, "train_epoch", None)

    monkeypatch.setattr(sys, "argv", ["leaderboard", "measure", "paths"])
    leaderboard.main()
    assert json.loads(kept.read_text()) == found | {"measured_by": code_version()}
    assert np.array_equal(np.load(folder / "ranks.npy"), told_N)
    assert np.array_equal(np.load(folder / "ranks-time-blind.npy"), blind_N)
    assert measure_requests() == ["paths"]


def test_what_ranks_otherwise_than_recorded_is_refused(circle):
    found = train("circle-ce", seed=1, threads=1)
    kept = circle / "results/circle-ce-1.json"
    ndcg = found["test"]["model"]["NDCG@10"]["mean"]
    found["test"]["model"]["NDCG@10"]["mean"] = ndcg * (1 + 1e-5)
    kept.write_text(json.dumps(found))
    with pytest.raises(
        ValueError, match=r"NDCG@10 of circle-ce with seed 1 \(model\) is 0\.\d+ now"
    ):
        measure_again("circle-ce", 1)
    assert json.loads(kept.read_text()) == found

    kept.write_text(json.dumps(found | {"targets_sha256": "others"}))
    with pytest.raises(ValueError, match="test targets of circle-ce with seed 1 are not those"):
        measure_again("circle-ce", 1)


def test_a_training_that_is_not_on_this_machine_is_not_measured_again(circle, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"circle-ce-1\.json; train circle-ce with seed 1"):
        measure_again("circle-ce", 1)
    train("circle-ce", seed=1, threads=1)
    (circle / "home/leaderboard/circle-ce-1/best/seal.json").unlink()
    with pytest.raises(CheckpointError, match="is not whole"):
        measure_again("circle-ce", 1)
    monkeypatch.setenv("NEXTITEM_HOME", str(circle / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="circle-ce-1/best; train circle-ce with seed 1"):
        measure_again("circle-ce", 1)


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
    (row,) = [line for line in text.splitlines() if line.startswith("| ease |")][:1]
    assert f"| {ease:.4f} ±" in row


@pytest.mark.usefixtures("circle")
def test_the_table_says_which_goals_are_reached():
    found = train("circle-ce", seed=1, threads=1)
    hit_rate, ndcg = (found["test"]["model"][metric]["mean"] for metric in ("HR@10", "NDCG@10"))
    goals = {"floor": (hit_rate, ndcg), "aim": [(hit_rate, ndcg + 1e-9)]}
    text = render([found], {"circle-ce": _ENTRY.model_copy(update=goals)})
    pair = f"{hit_rate:.3f} / {ndcg:.3f}"
    assert f"| {pair} ✓ | {pair} ✗ | 1 |" in text

    steps = {"aim": [(hit_rate, ndcg), (hit_rate, ndcg + 1e-9)]}
    text = render([found], {"circle-ce": _ENTRY.model_copy(update=steps)})
    assert f"|  | {pair} ✓, then {pair} ✗ | 1 |" in text


def test_the_table_says_how_far_the_best_row_of_a_data_set_is(circle, monkeypatch):
    events = published.DATASETS["circle"]()
    odd = replace(events, marks={"odd users": events.users_T % 2 == 1})
    monkeypatch.setattr(published, "DATASETS", {"circle": lambda: odd})
    found = train("circle-ce", seed=1, threads=1)
    worse = json.loads(json.dumps(found | {"row": "worse"}))
    worse["test"]["model"]["NDCG@10"]["mean"] = 0
    tests = [found["test"]["model"], found["slices"]["odd users"]["test"]["model"]]
    (hit_rate, ndcg), of_odd = ([test[m]["mean"] for m in ("HR@10", "NDCG@10")] for test in tests)
    goal = Goal(name="by feet", dataset="circle", floor=(hit_rate, ndcg), aim=(1, 1))
    monkeypatch.setattr(leaderboard_table, "GOALS", (goal,))
    text = render([found, worse], {"circle-ce": _ENTRY, "worse": _ENTRY})
    floor = f"floor {hit_rate:.3f} / {ndcg:.3f}"
    mark = "✓" if of_odd[0] >= hit_rate and of_odd[1] >= ndcg else "✗"
    assert (
        f"Best row by feet: circle-ce, {hit_rate:.4f} / {ndcg:.4f}, {floor} ✓, aim 1.000 / 1.000 ✗"
        f"; on the targets with odd users alone {of_odd[0]:.4f} / {of_odd[1]:.4f}, {floor} {mark}, "
    ) in text
    assert "Best row" not in render([found | {"dataset": "square"}], {"circle-ce": _ENTRY})


@pytest.mark.usefixtures("circle")
def test_the_table_says_where_its_figures_were_made():
    found = train("circle-ce", seed=1, threads=1)
    there = found | {"seed": 2, "machine": "9 cores of X, 1 GiB, Python 3.12.1, 2026-01-01"}
    text = render([found, there], {"circle-ce": _ENTRY})
    here = found["machine"].rpartition(", ")[0]
    first, second = sorted([here, "9 cores of X, 1 GiB, Python 3.12.1"])
    assert f"\nTrained and ranked on {first}; {second}.\n" in text


@pytest.mark.usefixtures("circle")
def test_the_table_names_the_trainings_that_do_not_say_what_code_they_ran():
    found = train("circle-ce", seed=1, threads=1)
    older = {key: value for key, value in found.items() if key != "code_version"}
    said = "Recorded before the version of the code was kept"
    text = render([found, *(older | {"seed": seed} for seed in (2, 3))], {"circle-ce": _ENTRY})
    assert f"\n{said}, by seed: circle-ce 2, 3.\n" in text
    assert said not in render([found], {"circle-ce": _ENTRY})


@pytest.mark.usefixtures("circle")
def test_rows_without_a_result_are_listed():
    found = train("circle-ce", seed=1, threads=1)
    later = _ENTRY.model_copy(
        update={"cut": (0.5, 0.75), "floor": (0.3, 0.2), "aim": [(0.4, 0.3), (0.5, 0.4)]}
    )
    last = later.model_copy(update={"cut_target": "last"})
    rows = {"circle-ce": _ENTRY, "later": later, "last": last}
    text = render([found], rows).split("## Not trained yet")[1]
    assert "| later | sasrec-ce | circle, temporal cut at 50% and 75% | 0.300 / 0.200 |" in text
    assert "| 0.400 / 0.300, then 0.500 / 0.400 |" in text
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
    lifts = text.split("Lift over")[1]
    (lift,) = [line for line in lifts.splitlines() if line.startswith("| circle-ce | ")]
    assert "%" in lift
    assert "[" not in lift

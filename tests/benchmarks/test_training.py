"""The benchmark of training: both sides get the same task, and what they did is told apart."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import (
    evaluation,
    published,
    training,
    training_compile,
    training_gpu,
    training_ray,
    training_sides,
)
from benchmarks.published import Events, read_dataset
from benchmarks.training import choose_cases, compare_sides, make_parser, record
from benchmarks.training_cases import CASES, Case, find_case, peer_options
from benchmarks.training_compile import measure_compile
from benchmarks.training_gpu import (
    LARGE,
    Projection,
    Work,
    count_work,
    measure_epoch,
    measure_large,
    read_large,
    training_flops,
)
from benchmarks.training_ray import (
    QUICK,
    Size,
    draw_sequences,
    measure_huge_pages,
    measure_loading,
    measure_scaling,
)
from benchmarks.training_record import render
from benchmarks.training_sides import (
    PEER,
    PeerError,
    Plan,
    Trained,
    peer_settings,
    prepare_peer,
    ranks_of,
    train_here,
    write_events,
)
from ray_jobs.job import HUGE_PAGES
from recsys import trainer as trainer_module
from recsys.context import NO_TIME
from recsys.metrics import mean_accuracy
from recsys.model_config import ModelConfig
from recsys.optimiser import scheduled_rate
from recsys.recipe import read_recipe

_OURS = Trained(1_000, 10.0, 100.0, 0.12, "torch 1")
_PEERS = Trained(300, 12.0, 25.0, 0.1, "rectools 0.19.0")


@pytest.fixture
def circle(monkeypatch):
    """Forty users who walk six steps along a circle of ten items."""
    users = np.repeat(np.arange(40), 6)
    items = (users * 3 + np.tile(np.arange(6), 40)) % 10
    events = Events(users, items, np.full(len(users), NO_TIME))
    monkeypatch.setattr(
        published, "DATASETS", {"circle": lambda: events, "small-shop": lambda: events}
    )
    return read_dataset("circle")


@pytest.mark.parametrize("name", sorted(CASES))
def test_both_sides_have_the_same_sizes(name):
    case = CASES[name]
    recipe, options = case.read_recipe(), peer_options(case, case.read_recipe())
    assert options["n_factors"] == recipe.model.dim
    assert options["n_blocks"] == recipe.model.num_layers
    assert options["n_heads"] == recipe.model.num_heads
    assert options["session_max_len"] == recipe.model.max_len
    assert options["dropout_rate"] == recipe.model.dropout
    assert options["batch_size"] == recipe.batch_size
    rates = {scheduled_rate(recipe.optimiser, step, 100) for step in (0, 50, 99)}
    assert rates == {options["lr"]}
    assert options.get("mask_prob", 0.2) == recipe.objective.mask_prob
    assert ("mask_prob" in options) == (recipe.model.attention == "bidirectional")


def test_the_cases_are_those_that_are_claimed():
    model = CASES["bert4rec"].read_recipe().model
    assert (model.dim, model.num_layers, model.num_heads, model.max_len) == (256, 4, 8, 50)
    model = CASES["sasrec"].read_recipe().model
    assert (model.dim, model.num_layers, model.num_heads, model.max_len) == (128, 2, 1, 200)
    assert [CASES[name].read_recipe().batch_size for name in ("bert4rec", "sasrec")] == [256, 128]


def test_a_loss_with_negatives_is_not_compared():
    case = Case("sasrec", {}, "SASRecModel")
    with pytest.raises(ValueError, match="sasrec learns by bce, which RecTools draws its own"):
        peer_options(case, case.read_recipe())


def test_the_peer_trains_on_the_events_that_train(circle, tmp_path):
    write_events(circle, tmp_path / "events.npz")
    events = np.load(tmp_path / "events.npz")
    assert len(events["users"]) == len(events["items"]) == 40 * 4
    assert events["users"][:5].tolist() == [0, 0, 0, 0, 1]
    assert (circle.catalogue.decode(events["items"][4:8]).to_pylist()) == [3, 4, 5, 6]
    assert events["targets"].tolist() == list(range(40))


def test_a_plan_reaches_the_peer():
    settings = peer_settings(CASES["sasrec-own-block"], Plan(epochs=3, threads=2, seed=7))
    assert settings["block"] == "own"
    assert [settings[key] for key in ("epochs", "threads", "seed", "k")] == [3, 2, 7, 20]
    json.dumps(settings)


def test_lists_become_ranks():
    ranks_N = ranks_of(np.array([[5, 6, 7], [6, 5, -1], [-1, -1, -1]]), np.array([5, 5, 5]), 100)
    assert ranks_N.tolist() == [1, 2, 100]
    assert mean_accuracy(ranks_N)["NDCG@10"] == pytest.approx((1 + 1 / np.log2(3)) / 3)


def test_ours_reports_what_it_trained(circle):
    case = Case("sasrec-ce", {"batch_size": 8, "model": {"dim": 16, "max_len": 8}}, "SASRecModel")
    case = Case(case.recipe, case.overrides, case.peer, dataset="circle")
    found = train_here(case, Plan(epochs=2, threads=1, seed=1), "fp32")
    assert min(found.tokens, found.epoch_s, found.tokens_per_s) > 0
    assert 0 < found.ndcg10 <= 1
    assert found.versions.endswith("float32")
    assert Trained.read(json.dumps(vars(found))) == found


def test_a_ratio_is_of_tokens_a_second():
    found = compare_sides("bert4rec", {"ours": [_OURS], PEER: [_PEERS], "ours, fp32": [_PEERS]})
    assert found["ratio"] == 4.0
    assert (found["ours_tokens_per_s"], found["peer_tokens_per_s"]) == (100, 25)
    assert (found["ours_ndcg10"], found["peer_ndcg10"]) == (0.12, 0.1)
    assert found["sides"][PEER]["epoch_s"] == 12.0


def test_several_trainings_count_by_their_median_and_mean():
    others = [Trained(1_000, 8.0, 125.0, 0.15, "torch 1"), Trained(1_000, 20.0, 50.0, 0.15, "")]
    found = compare_sides("sasrec", {"ours": [_OURS, *others]})["sides"]["ours"]
    assert (found["epoch_s"], found["tokens_per_s"]) == (10.0, 100.0)
    assert found["ndcg10"] == pytest.approx(0.14)


def test_without_the_peer_there_is_no_ratio():
    found = compare_sides("bert4rec", {"ours": [_OURS]})
    assert [found[key] for key in ("peer_tokens_per_s", "ratio", "peer_ndcg10")] == [None] * 3
    assert "not measured" in render({"bert4rec": _with_plan(found)})


def test_the_last_line_names_what_was_asked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "prepare_peer", lambda folder: folder)
    monkeypatch.setattr(training, "train_ours", lambda *_: _OURS)
    monkeypatch.setattr(training, "train_peer", lambda *_: _PEERS)
    monkeypatch.setattr(training, "measure_gpu", lambda: {"is_measured": False, "reason": "none"})
    arguments = ["--quick", "--peers-env", str(tmp_path), "--case", "sasrec", "gpu"]
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    training.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "sasrec": {
            "recipe": "sasrec-ce",
            "ours_tokens_per_s": 100,
            "peer": PEER,
            "peer_tokens_per_s": 25,
            "ratio": 4.0,
            "ours_ndcg10": 0.12,
            "peer_ndcg10": 0.1,
        }
    }


def test_the_record_shows_each_side_and_what_was_not_measured():
    workers = [
        {"workers": 1, "epoch_s": 61.0, "tokens_per_s": 70_000, "start_s": 12.0},
        {"workers": 2, "epoch_s": 40.0, "tokens_per_s": 99_000, "start_s": None},
    ]
    text = render(
        {
            "sasrec": _with_plan(compare_sides("s", {"ours": [_OURS], PEER: [_PEERS]})),
            "scaling": {
                "machine": "4 cores",
                "recipe": "bert4rec",
                "users": 10,
                "plain_epoch_s": 60.0,
                "workers": workers,
                "overhead": 1 / 60,
            },
            "loading": {
                "machine": "8 cores",
                "users": 1_000_000,
                "seconds": 9.0,
                "stages": {"tokens": 4.0},
            },
            "gpu": {"machine": "2 cores", **training_gpu.NOT_MEASURED},
        }
    )
    assert "| sasrec | ours | 1,000 | 10.0 | 100 | 4.00 | 0.1200 |" in text
    assert f"| sasrec | {PEER} | 300 | 12.0 | 25 | 1.00 | 0.1000 |" in text
    assert "one worker takes 1.7% more." in text
    assert "| 1 | 61.0 | 70,000 | 12.0 |\n" in text
    assert "| 2 | 40.0 | 99,000 | not measured |\n\n4 cores.\n" in text
    assert "1,000,000 users to the first batch: 9.0 s (tokens 4.0 s)" in text
    assert "Not measured: PyTorch finds no CUDA device" in text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (subprocess.TimeoutExpired("pip", 1), "pip took longer than 1800 s"),
        (subprocess.CalledProcessError(1, "pip", stderr="x\nERROR: no rectools\n"), "no rectools"),
        (OSError("No space left on device"), "No space left on device"),
    ],
)
def test_a_peer_that_cannot_be_installed_is_a_sentence(monkeypatch, tmp_path, error, reason):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(training_sides.venv, "create", lambda *_, **__: None)
    monkeypatch.setattr(training_sides.subprocess, "run", fail)
    with pytest.raises(PeerError, match=f"{reason}.*--peers-env, or run --quick"):
        prepare_peer(tmp_path / "peer")


def test_an_environment_that_has_the_peer_is_left_alone(monkeypatch, tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    monkeypatch.setattr(training_sides.venv, "create", lambda *_, **__: pytest.fail("created"))
    assert prepare_peer(tmp_path) == python


def test_a_run_without_epochs_is_refused(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--epochs", "0"])
    assert "0 is too few; give 1 or more" in capsys.readouterr().err


def test_a_quick_run_starts_no_ray():
    assert set(choose_cases(quick=True)).isdisjoint({"scaling", "loading"})
    assert set(choose_cases(quick=False)) == {*CASES, *training.OTHERS}


def test_a_quick_run_prints_one_object_and_records_nothing(circle, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "RESULTS", tmp_path)
    monkeypatch.setattr(
        training,
        "train_ours",
        lambda name, plan, _: train_here(find_case(name, quick=True), plan, "fp32"),
    )
    monkeypatch.setattr(sys, "argv", ["training", "--quick", "--epochs", "1", "--threads", "1"])
    training.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {"bert4rec", "sasrec"}
    assert found["bert4rec"]["ours_tokens_per_s"] > 0
    assert found["bert4rec"]["ratio"] is None
    assert not list(tmp_path.iterdir())


def test_a_full_run_is_recorded(monkeypatch, tmp_path, capsys):
    found = _with_plan(compare_sides("b", {"ours": [_OURS], PEER: [_PEERS]}))
    monkeypatch.setattr(training, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(training, "measure_cases", lambda _: iter([("bert4rec", found)]))
    monkeypatch.setattr(sys, "argv", ["training", "--peers-env", str(tmp_path)])
    training.main()
    kept = json.loads((tmp_path / "results/training.json").read_text())
    assert kept["bert4rec"] == found
    assert "| bert4rec | ours |" in (tmp_path / "results/training.md").read_text()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bert4rec"]["ratio"] == 4.0


def test_cases_that_were_not_measured_again_stay_in_the_record(tmp_path):
    old = _with_plan(compare_sides("b", {"ours": [_OURS], PEER: [_PEERS]}))
    loading = {"users": 10, "seconds": 9.0, "stages": {}, "machine": "2 cores"}
    record({"loading": loading, "bert4rec": old}, tmp_path)
    record({"loading": loading | {"seconds": 8.0}}, tmp_path)
    kept = json.loads((tmp_path / "training.json").read_text())
    assert list(kept) == ["bert4rec", "loading"]
    assert (kept["bert4rec"], kept["loading"]["seconds"]) == (old, 8.0)
    text = (tmp_path / "training.md").read_text()
    assert "first batch: 8.0 s" in text
    assert "| bert4rec | ours |" in text


def test_compiled_and_eager_epochs_take_turns(circle, monkeypatch):
    asked = []

    def answer(trainer):
        asked.append(trainer.config.compile)
        return [9.0, 9.0, 4.0, 3.0, 4.0, 3.0][len(asked) - 1]

    monkeypatch.setattr(trainer_module, "compile_blocks", lambda *_: "")
    monkeypatch.setattr(training_compile, "_train_epoch_s", answer)
    found = measure_compile(Plan(epochs=2, threads=1, seed=1, quick=True))
    assert asked == [False, True] * 3
    assert (found["eager_epoch_s"], found["compiled_epoch_s"], found["saved"]) == (4.0, 3.0, 0.25)
    text = render({"compile": {"machine": "2 cores", **found}})
    assert "3.0 s an epoch compiled, 4.0 s as written, so that compiling saves 25.0% of it" in text


def test_without_a_compiler_nothing_is_compared(circle, monkeypatch):
    monkeypatch.setattr(trainer_module, "compile_blocks", lambda *_: "no g++")
    found = measure_compile(Plan(epochs=1, threads=1, seed=1, quick=True))
    assert found == {"is_measured": False, "reason": "no g++"}
    assert "Not measured: no g++." in render({"compile": {"machine": "2 cores", **found}})


@pytest.mark.long
@pytest.mark.timeout(1_800)
@pytest.mark.filterwarnings("ignore:::torch")
def test_compiled_epochs_are_measured(circle):
    found = measure_compile(Plan(epochs=1, threads=1, seed=1, quick=True))
    torch._dynamo.reset()
    if not found["is_measured"]:
        pytest.skip(found["reason"])
    assert min(found["eager_epoch_s"], found["compiled_epoch_s"]) > 0


def test_work_is_counted_window_by_window():
    recipe = read_recipe("bert4rec", {"model": {"max_len": 10}})
    assert count_work(np.array([25, 4]), recipe) == Work(29, 100 + 100 + 25 + 16, 29 * 0.2)
    assert count_work(np.array([4]), read_recipe("sasrec-ce")).scored == 4


def test_flops_are_those_of_the_products():
    config = ModelConfig(dim=8, num_layers=2, num_heads=1, max_len=10)
    # Forward, a layer: 6 x 64 a token and 4 x 8 a pair for attention, then 18 x 64 a token, in the
    # last layer a scored position; and 16 x 5 a scored position; thrice in all.
    attention, rest = 2 * (3_840 + 3_200), 1_152 * (10 + 3)
    assert training_flops(config, 5, Work(10, 100, 3)) == 3 * (attention + rest + 240)


def test_an_epoch_is_measured_on_any_device(circle):
    recipe = read_recipe("bert4rec", {"batch_size": 8, "model": {"dim": 16, "max_len": 8}})
    found = measure_epoch("circle", torch.device("cpu"), recipe)
    assert found["epoch_s"] >= 0
    assert found["utilisation"] is None


def test_a_projection_is_tokens_over_tokens_a_second():
    # 1,000 users x 36 events at 10 tokens/s: 3,600 s.
    assert Projection(users=1_000, events=36).epoch_h(10.0) == 1.0


def test_the_large_catalogue_is_learned_in_each_way_that_is_claimed():
    recipes = {name: read_large(overrides) for name, overrides in LARGE.items()}
    ways = [(of.loss.kind, of.optimiser.item_rows) for of in recipes.values()]
    assert ways == [
        ("full-softmax", "all"),
        *(("sampled-softmax", rows) for rows in ("all", "touched")),
        *(("gbce", rows) for rows in ("all", "touched")),
    ]
    sizes = {(of.batch_size, of.model.max_len, of.model.dim) for of in recipes.values()}
    assert sizes == {(256, 50, 256)}


@pytest.mark.parametrize("name", sorted(LARGE))
def test_a_large_catalogue_is_measured_on_any_device(name):
    model = {"dim": 16, "num_layers": 1, "num_heads": 1, "max_len": 8}
    recipe = read_large({**LARGE[name], "batch_size": 8, "model": model})
    found = measure_large(evaluation.Size(16, 60, 10), torch.device("cpu"), recipe)
    assert found["peak_gib"] is None
    assert found["tokens_per_s"] > 0
    hours = Projection().epoch_h(found["tokens_per_s"])
    assert found["projected_epoch_h"] == pytest.approx(hours, abs=0.1, rel=0.01)


def test_the_record_of_a_gpu_says_what_is_projected(monkeypatch):
    epoch = {"epoch_s": 1.0, "tokens_per_s": 9, "tflops_per_s": 2.0, "utilisation": None}
    large = {"peak_gib": 7.5, "tokens_per_s": 90_000, "projected_epoch_h": 1.54}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(training_gpu, "measure_epoch", lambda *_: epoch)
    monkeypatch.setattr(training_gpu, "measure_large", lambda *_: large)
    text = render({"gpu": {"machine": "2 cores", **training_gpu.measure_gpu()}})
    assert "projected, not measured: 10,000,000 users x 50 training events" in text
    for name in LARGE:
        assert f"| {name} | 7.5 | 90,000 | 1.54 | 15.4 |" in text


def test_drawn_sequences_have_the_size_that_was_asked():
    rows = draw_sequences(np.array([3, 5]), Size(users=9, items=50, events=4), bucket=1)
    assert rows["user_id"].to_pylist() == [3, 5]
    for name in ("item_ids", "event_types", "timestamps", "devices"):
        assert [len(values) for values in rows[name].to_pylist()] == [4, 4]
    assert all(1 <= item <= 50 for items in rows["item_ids"].to_pylist() for item in items)
    assert all(times == sorted(times) for times in rows["timestamps"].to_pylist())


def test_the_overhead_of_ray_is_that_of_one_worker(monkeypatch):
    asked = []

    def answer(what, _, num_workers):
        asked.append((what, num_workers))
        if what == "plain":
            return {"epoch_s": [59.0, 60.0, 70.0], "tokens_per_s": [100.0] * 3}
        start_s = 12.3 if asked.count(("workers", 1)) < 2 else 14.3
        return {"epoch_s": [63.0, 63.0, 80.0], "tokens_per_s": [95.0] * 3, "start_s": [start_s]}

    monkeypatch.setattr(training_ray, "_ask", answer)
    found = measure_scaling(QUICK)
    assert asked == [*2 * [("plain", 1), ("workers", 1)], ("workers", 2), ("workers", 4)]
    assert found["overhead"] == 0.05
    assert found["workers"][0] == {
        "workers": 1,
        "epoch_s": 63.0,
        "tokens_per_s": 95,
        "start_s": 13.3,
    }
    assert "one worker takes 5.0% more." in render({"scaling": {"machine": "2 cores", **found}})
    faster = {"machine": "2 cores", **found, "overhead": -0.044}
    assert "one worker takes 4.4% less." in render({"scaling": faster})


def test_what_huge_pages_save_is_of_the_cpu(monkeypatch):
    asked = []

    def answer(what, _, num_workers, pages=HUGE_PAGES):
        asked.append((what, num_workers, dict(pages)))
        cpu_s = 9.0 if pages == HUGE_PAGES else 10.0
        return {"epoch_s": [11.0], "cpu_s": [cpu_s], "faults": [100 * cpu_s]}

    monkeypatch.setattr(training_ray, "_ask", answer)
    found = measure_huge_pages(QUICK)
    none = {"GLIBC_TUNABLES": ""}
    assert asked == 4 * [("plain", 1, none), ("plain", 1, HUGE_PAGES)]
    assert found["saved"] == 0.1
    text = render({"huge-pages": {"machine": "2 cores", **found}})
    assert "9.0 and 10.0 s of CPU, 11.0 and 11.0 s, 900 and 1,000 page faults" in text
    assert "save 10.0% of the CPU" in text


@pytest.mark.long
@pytest.mark.timeout(1_800)
def test_ray_is_measured_in_processes_of_its_own():
    loading, scaling = measure_loading(QUICK), measure_scaling(QUICK)
    assert set(loading["stages"]) == {"vocabulary", "tokens", "store", "trainer", "first batch"}
    assert [of["workers"] for of in scaling["workers"]] == [1, 2, 4]
    assert min(of["epoch_s"] for of in scaling["workers"]) > 0
    pages = measure_huge_pages(QUICK)
    assert min(pages[side][name] for side in ("with", "without") for name in pages["with"]) > 0


def _with_plan(found):
    plan = {"peer_block": "pre-norm", "dataset": "ml-1m.txt", "epochs": 3, "threads": 2}
    return {"machine": "2 cores", **found, **plan}

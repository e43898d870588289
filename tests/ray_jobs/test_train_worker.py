"""What a worker of a training does, without Ray around it."""

import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from ray.train import Checkpoint

from ray_jobs import train_worker
from ray_jobs.sequences_reader import Vocabulary
from ray_jobs.train_worker import WorkerPlan, build_trainer, resume_from
from recsys.checkpoint import save_checkpoint
from recsys.errors import TrainingError
from recsys.item_codes import learn_codes
from recsys.item_start import spectral_vectors
from recsys.recipe import read_recipe
from recsys.splits import leave_one_out
from tests.ray_jobs.conftest import tiny_config
from tests.recsys.processes import join_ranks, leave_ranks
from tests.recsys.test_trainer import make_trainer


@pytest.fixture
def worker(shop, tmp_path, monkeypatch):
    """Makes a plan, and lets a worker run it with the shop's tokens; returns what it returned and
    what it reported."""
    monkeypatch.setattr(train_worker, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(train_worker, "collect_tokens", lambda *_: shop.store)
    monkeypatch.setattr(train_worker, "_available_bytes", lambda _: 2**33)
    monkeypatch.setattr("ray.train.get_dataset_shard", lambda _: None)
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: None)
    reports = []
    monkeypatch.setattr(
        "ray.train.report", lambda metrics, checkpoint=None: reports.append((metrics, checkpoint))
    )

    def make_plan(*settings, **overrides):
        config = tiny_config(tmp_path, "train.trainer.max_epochs=2", *settings)
        overrides = {"batch_size": 8, **overrides}
        overrides["model"] = {"dim": 16, "max_len": 8} | overrides.get("model", {})
        recipe = read_recipe("sasrec-ce", overrides)
        return WorkerPlan(config, recipe, Vocabulary(shop.catalogue, shop.context))

    def run(*settings, **overrides):
        returned = train_worker.train_worker({"plan": make_plan(*settings, **overrides)})
        return returned, reports

    run.plan = make_plan
    return run


def test_every_epoch_is_reported_and_validated_ones_leave_a_checkpoint(worker):
    returned, reports = worker("train.trainer.max_epochs=3", "train.trainer.validate_every=2")
    assert returned == {}
    assert [metrics["epoch"] for metrics, _ in reports] == [1, 2, 3]
    assert [checkpoint is not None for _, checkpoint in reports] == [False, True, True]


def test_checkpoints_within_an_epoch_tell_how_far_it_is(worker):
    _, reports = worker("train.trainer.checkpoint_every_steps=2", "train.trainer.max_epochs=1")
    *within, (last, _) = reports
    assert within
    assert [metrics["step"] for metrics, _ in within] == list(range(2, within[0][0]["steps"], 2))
    assert all(checkpoint is not None and m["epoch"] == 0 for m, checkpoint in within)
    assert all(metrics["loss"] > 0 < metrics["tokens_per_s"] for metrics, _ in within)
    assert "step" not in last


@pytest.mark.parametrize("seed", range(5))
def test_the_best_epoch_and_the_two_latest_checkpoints_are_kept(seed):
    rng = np.random.default_rng(seed)
    trainer = SimpleNamespace(epoch=0, step=0, best_epoch=0)
    kept, last = [], None
    for _ in range(60):
        before = last
        if rng.random() < 0.5:
            trainer.step += 1
        else:
            trainer.epoch, trainer.step = trainer.epoch + 1, 0
            if rng.random() < 0.4:
                trainer.best_epoch = trainer.epoch
        last = trainer.epoch, trainer.step
        # As Ray does: those that stand alike by their age, and the latest in any case.
        kept.append((train_worker._standing(trainer), last))
        kept.sort(key=lambda pair: pair[0])
        kept = [pair for pair in kept[:-3] if pair[1] == last] + kept[-3:]
        places = [place for _, place in kept]
        assert last in places
        assert before is None or before in places
        assert not trainer.best_epoch or (trainer.best_epoch, 0) in places


def test_checkpoints_are_tried_from_the_latest_to_the_earliest(monkeypatch):
    def report(path, **metrics):
        return SimpleNamespace(checkpoint=Checkpoint(path), metrics=metrics)

    reports = [report("/b", epoch=1), report("/d", epoch=2, step=4), report("/c", epoch=2, step=2)]
    reports.append(report("/a", epoch=1, step=9))
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: reports[1].checkpoint)
    monkeypatch.setattr("ray.train.get_all_reported_checkpoints", lambda: reports)
    found = [checkpoint.path for checkpoint in train_worker._reported_checkpoints()]
    assert found == ["/d", "/c", "/a", "/b"]


def test_progress_is_told_without_a_checkpoint(worker):
    _, reports = worker("train.trainer.report_every_seconds=1e-9", "train.trainer.max_epochs=1")
    *within, (last, _) = reports
    assert [metrics["step"] for metrics, _ in within] == list(range(1, within[0][0]["steps"]))
    assert all(checkpoint is None for _, checkpoint in within)
    assert "step" not in last


def test_a_loss_that_is_not_finite_is_returned_and_not_tried_again(worker):
    returned, reports = worker(optimiser={"learning_rate": 1e30})
    assert "lower optimiser.learning_rate (now 1e+30)" in returned["refused"]
    assert all(np.isfinite(metrics["loss"]) for metrics, _ in reports)


def test_why_a_model_is_not_compiled_is_returned(worker, monkeypatch):
    monkeypatch.setattr("recsys.trainer.compile_blocks", lambda *_: "no compiler")
    returned, reports = worker("train.trainer.compile=true")
    assert returned == {"eager_because": "no compiler"}
    assert len(reports) == 2


def test_what_cannot_fit_is_refused_before_it_is_built(worker, monkeypatch):
    monkeypatch.setattr(train_worker, "_available_bytes", lambda _: 1000)
    monkeypatch.setattr(train_worker, "build_trainer", pytest.fail)
    returned, reports = worker()
    assert "Training would need" in returned["refused"]
    assert not reports


def test_figures_are_told_when_another_worker_has_less_memory(worker, monkeypatch):
    def gather(rows_R1):
        return torch.cat([rows_R1, rows_R1.new_tensor([[1_000]])])

    monkeypatch.setattr(train_worker, "gather_rows", gather)
    monkeypatch.setattr(train_worker, "build_trainer", pytest.fail)
    returned, _ = worker()
    assert "where 0.00 GB are free; " in returned["refused"]


def test_each_setting_that_is_offered_makes_it_fit(worker, shop, tmp_path, monkeypatch):
    large = "train.overrides.batch_size=512", "train.overrides.model.dim=128"

    def check(*settings):
        config = tiny_config(tmp_path, *large, *settings)
        recipe = read_recipe(config.train.recipe, config.train.overrides)
        plan = WorkerPlan(config, recipe, Vocabulary(shop.catalogue, shop.context))
        train_worker._refuse_what_cannot_fit(plan, shop.store)

    for megabytes in (100, 20):
        monkeypatch.setattr(train_worker, "_available_bytes", lambda _, n=megabytes: n * 10**6)
        with pytest.raises(TrainingError) as refused:
            check()
        offered = re.search(r"free; (.*) would fit\.", str(refused.value))[1].split(" or ")
        for one in offered:
            # On the command line, where nothing stands around the first sign of equality.
            lines = one.rpartition(" (")[0].split(" with ")
            check(*(line.replace(" = ", "=", 1) for line in lines))


def test_what_will_be_held_is_said_beforehand(worker, capsys):
    worker()
    assert "each worker will hold up to 0." in capsys.readouterr().out


def test_item_codes_are_learned_once_and_then_come_with_the_checkpoint(worker, shop):
    plan = worker.plan(model={"item_codes": {"length": 4}})
    codes, split = plan.recipe.model.item_codes, leave_one_out(shop.store.offsets_U)
    seed = plan.config.seed
    learned, resumed = (
        build_trainer(plan, shop.store, is_new=is_new).model.items.codes for is_new in (True, False)
    )
    expected = learn_codes(codes, shop.store, split, shop.catalogue, seed=seed)
    assert np.array_equal(learned.numpy(), expected)
    assert not torch.equal(resumed, learned)


def test_items_of_a_new_training_begin_where_its_recipe_says(worker, shop):
    plan = worker.plan()
    plan = replace(plan, recipe=plan.recipe.model_copy(update={"item_start": "spectral"}))
    new, resumed = (
        build_trainer(plan, shop.store, is_new=is_new).model.items.weight.detach()
        for is_new in (True, False)
    )
    split, seed = leave_one_out(shop.store.offsets_U), plan.config.seed
    sizes = shop.catalogue.num_rows, plan.recipe.model.dim
    cpu = torch.device("cpu")
    directions_ID = spectral_vectors(shop.store, split, *sizes, seed=seed, device=cpu)
    is_known_I = directions_ID.any(dim=1)
    lengths_I = new.norm(dim=1, keepdim=True)
    assert torch.allclose((new / lengths_I)[is_known_I], directions_ID[is_known_I], atol=1e-5)
    assert not torch.allclose(new, resumed, atol=1e-2)


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path, caplog):
    checkpoints = []
    for number in (2, 1):
        trainer = make_trainer(max_epochs=9)
        trainer.epoch = number
        save_checkpoint(tmp_path / str(number), trainer)
        checkpoints.append(Checkpoint.from_directory(tmp_path / str(number)))
    trainer = make_trainer(max_epochs=9)
    resume_from(checkpoints, trainer)
    assert trainer.epoch == 2

    for number, expected in ((2, 1), (1, None)):
        (content,) = (tmp_path / str(number)).glob("training-*.pt")
        content.write_bytes(content.read_bytes()[:100])
        trainer = make_trainer(max_epochs=9)
        if expected is not None:
            resume_from(checkpoints, trainer)
            assert trainer.epoch == expected
    assert "Going on from the checkpoint before it" in caplog.text
    with pytest.raises(TrainingError, match="None of the run's 2 checkpoints is whole"):
        resume_from(checkpoints, make_trainer(max_epochs=9))
    resume_from([], trainer)


def test_a_run_that_is_configured_otherwise_is_refused_with_what_differs(tmp_path):
    save_checkpoint(tmp_path, make_trainer())
    message = r"batch_size was 16 and is 32; configure what the run began with, or give train.name"
    with pytest.raises(TrainingError, match=message):
        resume_from([Checkpoint.from_directory(tmp_path)], make_trainer(batch_size=32))


def test_minutes_of_tries_before_count(worker, shop, tmp_path, monkeypatch):
    settings = [f"train.trainer.{pair}" for pair in ("max_minutes=10", "validate_every=1")]
    before = build_trainer(worker.plan(*settings), shop.store)
    before._seconds_before = 601.0
    assert before.config.max_epochs > 1
    save_checkpoint(tmp_path / "before", before)
    kept = [Checkpoint.from_directory(tmp_path / "before")]
    monkeypatch.setattr(train_worker, "_reported_checkpoints", lambda: kept)
    _, reports = worker(*settings)
    assert len(reports) == 1


class _Unreachable:
    """A checkpoint in a store that does not answer."""

    path = "far"

    @contextmanager
    def as_directory(self):
        raise OSError("the store does not answer")
        yield


def _resume_as_rank(rank, world_size, folder):
    """Rank 1 finds its copy of the latest checkpoint damaged, and then cannot reach one."""
    own = Path(folder) / str(rank)
    join_ranks(folder, rank, world_size)
    checkpoints = []
    for number in (3, 2, 1):
        trainer = make_trainer(max_epochs=9)
        trainer.epoch = number
        with torch.no_grad():
            trainer.model.item_bias.fill_(number)
        save_checkpoint(own / str(number), trainer)
        checkpoints.append(Checkpoint.from_directory(own / str(number)))
    if rank == 1:
        (content,) = (own / "3").glob("training-*.pt")
        content.write_bytes(content.read_bytes()[:100])
    trainer = make_trainer(max_epochs=9)
    resume_from(checkpoints, trainer)
    told = {"epoch": trainer.epoch, "bias": trainer.model.item_bias.detach().clone()}
    try:
        resume_from([_Unreachable() if rank == 1 else checkpoints[1], *checkpoints], trainer)
    except OSError as error:
        told["error"] = str(error)
    leave_ranks(told, Path(folder) / f"{rank}.pt")


def test_ranks_go_on_from_the_same_checkpoint_or_all_try_again(tmp_path):
    mp.spawn(_resume_as_rank, args=(2, str(tmp_path)), nprocs=2, join=True)
    for rank in range(2):
        told = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert told["epoch"] == 2
        assert (told["bias"] == 2).all()
        assert told["error"].startswith("1 of 2 workers cannot reach the checkpoint")


def test_a_store_that_does_not_answer_is_no_damaged_checkpoint():
    with pytest.raises(OSError, match=r"far: the store does not answer"):
        resume_from([_Unreachable()], make_trainer())

"""Blocks that torch.compile has compiled, and what happens where it cannot."""

import logging
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from recsys import compilation
from recsys.blocks import Block
from recsys.compilation import compile_blocks, leave_eager
from tests.recsys.processes import join_ranks, leave_ranks
from tests.recsys.test_trainer import make_trainer

# Of the modules of torch itself, whose compiler warns of its own doings.
pytestmark = pytest.mark.filterwarnings("ignore:::torch")


@pytest.fixture
def compiler():
    """Skips the test where torch finds no C++ compiler."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        pytest.skip(f"no C++ compiler: {error}")
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_compiled_model_learns_as_an_eager_one():
    losses, gains = [], []
    for is_compiled in (False, True):
        trainer = make_trainer("bert4rec", max_epochs=3, compile=is_compiled)
        assert trainer.eager_because == ""
        reports = [trainer.train_epoch() for _ in range(3)]
        losses.append([report.loss for report in reports])
        gains.append(reports[-1].ndcg10)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert gains[1] == pytest.approx(gains[0], abs=0.05)


def _train_compiled(rank, folder):
    # What ranks agree on needs no kernels, whose compilation takes a minute.
    Block.compile = _trace_alone
    join_ranks(folder, rank, world_size=2)
    trainer = make_trainer("sasrec-ce", max_epochs=2, compile=True)
    loss = trainer.train_epoch().loss
    told = {"loss": loss, "eager_because": trainer.eager_because}
    leave_ranks(told, Path(folder) / f"{rank}.pt")


def _trace_alone(block, **_):
    torch.nn.Module.compile(block, dynamic=True, backend="aot_eager")


@pytest.mark.slow
def test_ranks_compile_together_and_learn_the_same(tmp_path):
    expected = make_trainer("sasrec-ce", max_epochs=2).train_epoch().loss
    torch.multiprocessing.spawn(_train_compiled, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        told = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert told == {"loss": pytest.approx(expected, rel=1e-3), "eager_because": ""}


def _blocks(trainer):
    return [block._compiled_call_impl for block in trainer.model.blocks]


def test_without_a_compiler_training_goes_on_and_says_why(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("No working C++ compiler found:\n  g++")

    monkeypatch.setattr(compilation, "_try_step", fail)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(max_epochs=1, compile=True)
    assert trainer.eager_because == "RuntimeError: No working C++ compiler found"
    assert _blocks(trainer) == [None, None]
    assert caplog.messages == [
        "Training goes on without torch.compile: RuntimeError: No working C++ compiler found."
    ]
    assert trainer.train_epoch().loss == make_trainer(max_epochs=1).train_epoch().loss


def test_a_trial_leaves_nothing_behind(monkeypatch):
    # Eager blocks are tried: what is compiled behaves in the same way.
    monkeypatch.setattr("recsys.blocks.Block.compile", Mock())
    model = make_trainer().model.eval()
    assert compile_blocks(model, torch.float32) == ""
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_is_eager_again_when_it_is_left_so():
    trainer = make_trainer()
    for block in trainer.model.blocks:
        block.compile()
    leave_eager(trainer.model)
    assert _blocks(trainer) == [None, None]

"""A checkpoint is whole or refused."""

import hashlib
import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from recsys.checkpoint import load_checkpoint, read_weights, save_checkpoint, verify_checkpoint
from recsys.errors import CheckpointError
from tests.recsys.test_trainer import PURCHASES, cycles, make_trainer, with_purchases


@pytest.fixture
def saved(tmp_path):
    trainer = make_trainer(max_epochs=3)
    trainer.train_epoch()
    save_checkpoint(tmp_path, trainer)
    return tmp_path


def content_of(folder):
    (path,) = folder.glob("training-*.pt")
    return path


def test_weights_come_back(saved):
    trainer = make_trainer(max_epochs=3)
    load_checkpoint(saved, trainer)
    weights = read_weights(saved)
    assert trainer.epoch == 1
    assert all(torch.equal(weights[name], w) for name, w in trainer.model.state_dict().items())


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "unsealed", "no seal"])
def test_what_is_damaged_is_refused(saved, damage):
    path, seal = content_of(saved), saved / "seal.json"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "gone":
        path.unlink()
    elif damage == "unsealed":
        seal.unlink()
    else:
        seal.write_text("{")
    trainer = make_trainer(max_epochs=3)
    with pytest.raises(CheckpointError, match=r"not whole|cut off or altered"):
        load_checkpoint(saved, trainer)
    assert trainer.epoch == 0


def test_what_was_sealed_and_is_no_checkpoint_is_refused(saved):
    path = content_of(saved)
    for content in (b"no archive", b"", b"PK\x03\x04 an archive that ends"):
        path.write_bytes(content)
        seal = {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()}
        (saved / "seal.json").write_text(json.dumps(seal))
        with pytest.raises(CheckpointError, match="is sealed and cannot be read"):
            read_weights(saved)


def test_what_cannot_be_reached_is_not_called_damaged(saved, monkeypatch):
    with pytest.raises(FileNotFoundError):
        verify_checkpoint(saved / "of-a-folder-that-is-not-there")

    unreachable = Mock(side_effect=OSError(5, "Input/output error"))
    monkeypatch.setattr(Path, "open", unreachable)
    with pytest.raises(OSError, match="Input/output error"):
        read_weights(saved)


def test_a_checkpoint_of_another_model_is_refused(saved):
    other = make_trainer("sasrec-ce", max_epochs=3, overrides={"model": {"num_layers": 1}})
    with pytest.raises(CheckpointError, match="is of another training"):
        load_checkpoint(saved, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 60}, "batch_size was 16 and is 60"),
        (
            {"overrides": {"optimiser": {"learning_rate": 1e-2}}},
            "optimiser.learning_rate was 0.005 and is 0.01",
        ),
        (
            {"overrides": {"objective": {"mask_prob": 0.5}}},
            "objective.mask_prob was 0.2 and is 0.5",
        ),
        ({"seed": 1}, "seed was 0 and is 1"),
        (
            {"store": with_purchases(cycles()), "data": {"targets": PURCHASES}},
            "targets was None and is ",
        ),
        # Of twelve events ten train.
        ({"store": cycles(length=13)}, "the number of training events was 600 and is 660"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_with_what_differs(
    saved, changes, message
):
    trainer = make_trainer(max_epochs=3, **changes)
    before = [weight.clone() for weight in trainer.model.state_dict().values()]
    with pytest.raises(CheckpointError, match=f"is of another training: .*{message}"):
        load_checkpoint(saved, trainer)
    assert trainer.epoch == 0
    now = trainer.model.state_dict().values()
    assert all(torch.equal(*pair) for pair in zip(before, now, strict=True))


def test_how_long_and_in_how_many_parts_may_change(saved):
    trainer = make_trainer(
        max_epochs=7,
        patience=2,
        validate_every=3,
        validation_users=10,
        micro_batches=2,
        checkpoint_every_steps=1,
        report_every_seconds=5,
    )
    load_checkpoint(saved, trainer)
    assert trainer.epoch == 1
    trainer.train_epoch()


def test_the_time_of_tries_before_is_counted(saved):
    first, second = (make_trainer(max_epochs=3) for _ in range(2))
    first._seconds_before = 1000.0
    save_checkpoint(saved, first)
    load_checkpoint(saved, second)
    assert 1000.0 < second.seconds < 2000.0


def test_a_checkpoint_from_before_there_were_fingerprints_goes_on(saved):
    before = make_trainer(max_epochs=3)
    load_checkpoint(saved, before)
    state = before.state()
    del state["fingerprint"], state["seconds"]
    trainer = make_trainer(max_epochs=3)
    trainer.restore(state, before.model.state_dict())
    assert trainer.epoch == 1


def test_a_full_disk_leaves_the_checkpoint_before(saved, monkeypatch):
    before = json.loads((saved / "seal.json").read_text())
    trainer = make_trainer(max_epochs=3)
    load_checkpoint(saved, trainer)
    trainer.train_epoch()

    def fail(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(saved, trainer)
    verify_checkpoint(saved)
    assert json.loads((saved / "seal.json").read_text()) == before
    assert sorted(path.name for path in saved.iterdir()) == ["seal.json", before["file"]]


def test_a_later_checkpoint_takes_the_place_of_the_earlier_one(saved):
    trainer = make_trainer(max_epochs=3)
    load_checkpoint(saved, trainer)
    trainer.train_epoch()
    save_checkpoint(saved, trainer)
    assert [path.name for path in saved.glob("training-*.pt")] == ["training-2-0.pt"]
    verify_checkpoint(saved)

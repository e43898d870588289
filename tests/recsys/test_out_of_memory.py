"""What is advised after a step that did not fit."""

import pytest

from recsys.out_of_memory import advise_less


@pytest.mark.parametrize(
    ("batch_size", "micro_batches", "world_size", "advice"),
    [
        (64, 4, 2, ["micro_batches to 8", "batch_size to 32"]),
        (18, 10, 1, ["micro_batches to 18"]),
        (8, 2, 2, ["micro_batches to 4", "batch_size to 4"]),
        (4, 2, 2, ["a smaller model"]),
    ],
)
def test_every_part_of_a_batch_keeps_a_window(batch_size, micro_batches, world_size, advice):
    found = advise_less(batch_size, micro_batches, world_size).split(", or ")
    assert len(found) == len(advice)
    for text, wanted in zip(found, advice, strict=True):
        assert wanted in text

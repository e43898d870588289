"""When ranks look at their progress, by a clock of the test."""

import math

import pytest
import torch

from recsys.progress import Watch, num_not_finite


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def steps_of(step_s, num_steps, tell_every_s=30.0):
    """The steps after which ranks looked, and those after which they told."""
    clock = Clock()
    watch = Watch(tell_every_s, torch.device("cpu"), clock)
    looked, told = [], []
    for step in range(1, num_steps + 1):
        clock.now += step_s
        if watch.is_due():
            looked.append(step)
            if watch.look():
                told.append(step)
    return looked, told


@pytest.mark.parametrize(
    ("step_s", "looked", "told"),
    [
        (0.5, [1, 11, 21, 31, 41, 51, 61], [61]),  # ten steps take five seconds
        (20.0, [1, 2, 3, 4, 5], [2, 4]),
        (0.0001, [1, 1001, 2001], []),  # a thousand steps at most
    ],
)
def test_ranks_look_every_five_seconds_and_tell_every_thirty(step_s, looked, told):
    assert steps_of(step_s, max(looked)) == (looked, told)


def test_a_new_epoch_counts_from_its_beginning():
    clock = Clock()
    watch = Watch(30.0, torch.device("cpu"), clock)
    clock.now = 100.0  # a validation
    watch.begin()
    clock.now += 1.0
    assert watch.is_due()
    assert not watch.look()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(number):
    values = {"a": [torch.ones(3), {"b": torch.tensor([1.0, number]).bfloat16()}], "c": "text"}
    assert num_not_finite(values) == 1
    assert num_not_finite([torch.ones(2), torch.ones(2, dtype=torch.uint8), 3, None]) == 0
    assert num_not_finite([]) == 0

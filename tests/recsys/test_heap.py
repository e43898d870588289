"""What lies free in the heap goes back to the system."""

import os
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from recsys.heap import Heap


def test_it_is_tended_to_now_and_then():
    clock = SimpleNamespace(now=100.0)
    heap = Heap(60, lambda: clock.now)
    if heap._trim is None:
        pytest.skip("the C library has no malloc_trim")
    found = []
    for clock.now in (159.0, 160.0, 161.0, 219.0, 220.0):
        found.append(heap.tend())
    assert found == [False, True, False, False, True]


def test_holes_between_what_lives_go_back_to_the_system():
    heap = Heap(0)
    if heap._trim is None:
        pytest.skip("the C library has no malloc_trim")
    # Too small for mappings of their own; each second one is let go.
    pieces = [np.ones(5_000) for _ in range(10_000)]
    pieces[::2] = [None] * 5_000
    before = psutil.Process(os.getpid()).memory_info().rss
    assert heap.tend()
    freed = before - psutil.Process(os.getpid()).memory_info().rss
    assert freed > 100 * 2**20, f"{freed:,} of about 200,000,000 bytes"
    assert pieces[1].sum() == 5_000

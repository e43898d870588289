"""What lies free in the heap goes back to the system."""

import os
import subprocess
import sys
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


_MANY_SHAPES = """
import os, sys
import psutil, torch
from recsys.heap import Heap
from recsys.memory_plan import Workload, plan_memory
from recsys.recipe import read_recipe

if sys.argv[1] == "bounded":
    Heap.bound_kernels()
if sys.argv[1] == "planned":
    # As a worker of `ray_jobs.train` does before it makes a trainer.
    load = Workload(num_rows=100, num_tokens=1_000, context_sizes=(), dtype=torch.bfloat16)
    plan_memory(read_recipe("bert4rec"), load)
    Heap.bound_kernels()
torch.set_num_threads(1)
right = torch.ones(64, 256, dtype=torch.bfloat16)

def multiply(sizes):
    for size in sizes:
        torch.ones(size, 64, dtype=torch.bfloat16) @ right
    return psutil.Process(os.getpid()).memory_info().rss

first = multiply(range(100, 200))
print(multiply(range(200, 900)) - first)
"""


@pytest.mark.slow
def test_kernels_of_ever_new_shapes_are_not_kept():
    grew = {}
    for how in ("bounded", "planned", "as it comes"):
        environment = {k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")}
        done = subprocess.run(
            [sys.executable, "-c", _MANY_SHAPES, how],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        grew[how] = int(done.stdout)
    if grew["as it comes"] < 20 * 2**20:
        pytest.skip("products in bf16 are not made by oneDNN here")
    assert max(grew["bounded"], grew["planned"]) < grew["as it comes"] / 4, grew


def test_what_the_environment_says_of_kernels_counts(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "9")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    Heap.bound_kernels()
    assert os.environ["LRU_CACHE_CAPACITY"] == "9"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"

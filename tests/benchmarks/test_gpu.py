"""The benchmark of training at its real size, on a CUDA device."""

import pytest
import torch

from benchmarks.training_gpu import LARGE, TWO_MILLION, measure_large, read_large
from recsys.catalogue import NUM_SPECIAL
from recsys.memory_plan import Workload, plan_memory

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def large():
    device = torch.device("cuda")
    return {
        name: measure_large(TWO_MILLION, device, read_large(overrides))
        for name, overrides in LARGE.items()
    }


def test_two_million_items_are_trained_in_each_way(large):
    # Weights and their two moments alone: 3 x 2 M x 256 x 4 bytes.
    assert all(of["peak_gib"] > 5.7 for of in large.values())
    for name in ("sampled softmax", "gBCE"):
        assert large[f"{name}, touched rows"]["peak_gib"] < large[name]["peak_gib"]


def test_two_million_items_fit_where_they_are_meant_to(large):
    assert large["full softmax"]["peak_gib"] < 24
    assert large["sampled softmax, touched rows"]["peak_gib"] < 12


@pytest.mark.parametrize("name", LARGE)
def test_no_more_is_held_than_was_planned(large, name):
    workload = Workload(
        num_rows=TWO_MILLION.items + NUM_SPECIAL,
        num_tokens=TWO_MILLION.users * TWO_MILLION.events,
        context_sizes=(),
        dtype=torch.bfloat16,
        is_cuda=True,
    )
    planned = plan_memory(read_large(LARGE[name]), workload)
    assert large[name]["peak_gib"] * 2**30 <= planned.total_bytes

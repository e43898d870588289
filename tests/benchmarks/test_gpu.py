"""The benchmark of training at its real size, on a CUDA device."""

import pytest
import torch

from benchmarks.training_gpu import LARGE, TWO_MILLION, measure_large, read_large

pytestmark = pytest.mark.gpu


def test_two_million_items_are_trained_in_each_way():
    device = torch.device("cuda")
    found = {
        name: measure_large(TWO_MILLION, device, read_large(overrides))
        for name, overrides in LARGE.items()
    }
    # Weights and their two moments alone: 3 x 2 M x 256 x 4 bytes.
    assert all(of["peak_gib"] > 5.7 for of in found.values())
    for name in ("sampled softmax", "gBCE"):
        assert found[f"{name}, touched rows"]["peak_gib"] < found[name]["peak_gib"]

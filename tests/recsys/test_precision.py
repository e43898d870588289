"""In which numbers a model counts, by its device."""

import pytest
import torch

from recsys.precision import choose_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_what_is_asked_for_is_taken(device):
    assert choose_dtype("bf16", device) == torch.bfloat16
    assert choose_dtype("fp32", device) == torch.float32


@pytest.mark.parametrize("is_native", [True, False])
def test_a_gpu_that_only_emulates_bf16_counts_in_fp32(is_native, monkeypatch):
    def is_supported(including_emulation=True):
        return is_native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert choose_dtype("auto", CUDA) == (torch.bfloat16 if is_native else torch.float32)


@pytest.mark.parametrize("is_native", [True, False])
def test_a_cpu_counts_in_bf16_where_it_multiplies_it(is_native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_native)
    assert choose_dtype("auto", CPU) == (torch.bfloat16 if is_native else torch.float32)

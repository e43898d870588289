"""In which numbers a model counts, by its device."""

import pytest
import torch

from recsys import precision
from recsys.precision import choose_dtype, time_product

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


@pytest.fixture
def measured_anew():
    precision._multiplies_bf16_faster.cache_clear()
    yield
    precision._multiplies_bf16_faster.cache_clear()


@pytest.mark.usefixtures("measured_anew")
@pytest.mark.parametrize(
    ("is_native", "times_fp32", "dtype"),
    [(True, 0.5, torch.bfloat16), (True, 2.0, torch.float32), (False, 0.5, torch.float32)],
)
def test_a_cpu_counts_in_bf16_where_it_multiplies_it_faster(
    is_native, times_fp32, dtype, monkeypatch
):
    def time_product(left, right):
        assert left.dtype == right.dtype
        return times_fp32 if left.dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_native)
    monkeypatch.setattr(precision, "time_product", time_product)
    assert choose_dtype("auto", CPU) == dtype


def test_the_clock_is_read_around_products():
    small, large = torch.ones(8, 8), torch.ones(1024, 1024)
    assert 0 < time_product(small, small) < time_product(large, large)

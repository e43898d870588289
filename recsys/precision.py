"""In which numbers a model counts."""

import torch


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bf16 when asked for, or when `auto` finds a device that multiplies it natively."""
    if precision == "auto":
        is_native = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else torch.cpu._is_avx512_bf16_supported()
        )
        precision = "bf16" if is_native else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32

"""torch.compile of the encoder's blocks for training, where the machine has a compiler that can.

Blocks of one kind share their code, so that two are compiled and not all of them: those before the
last one, and the last one, which computes the scored positions alone. Lengths of batches and
numbers of scored positions are dynamic.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from recsys.catalogue import NUM_SPECIAL, PAD
from recsys.model import NextItemModel
from recsys.randomness import Draws

_WINDOWS = 3
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    # It would work out products of int64 words without their wrapping round, see `randomness`.
    "constant_and_index_propagation": False,
}


def compile_blocks(model: NextItemModel, dtype: torch.dtype) -> str:
    """Compiles the blocks in place and tries them, forward and backward; call it before gradients
    matter, on the model's own device.

    Returns:
        Why the model stays as it was, one clause; empty where it is compiled.
    """
    for block in model.blocks:
        block.compile(dynamic=True, options=_OPTIONS)
    try:
        _try_step(model, dtype)
    except Exception as error:  # every compiler fails in ways of its own, and none is needed
        leave_eager(model)
        return _describe(error)
    finally:
        model.zero_grad()
    return ""


def leave_eager(model: NextItemModel) -> None:
    """Undoes `compile_blocks`."""
    for block in model.blocks:
        block._compiled_call_impl = None


def run_eagerly() -> contextlib.AbstractContextManager[None]:
    """Where compiled blocks run as they are written: nothing is compiled for a validation."""
    stance: contextlib.AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _try_step(model: NextItemModel, dtype: torch.dtype) -> None:
    """A step of the blocks on windows of two lengths."""
    device, max_len = model.item_bias.device, model.config.max_len
    was_training = model.training
    model.train()
    try:
        for L in (max_len, max(2, max_len - 1)):
            items_BL = torch.full((_WINDOWS, L), NUM_SPECIAL, device=device)
            seconds_BL2 = torch.zeros(_WINDOWS, L, 2, dtype=torch.int32, device=device)
            x_BLD = torch.zeros(_WINDOWS, L, model.config.dim, device=device, requires_grad=True)
            noise = Draws(0, 0, torch.arange(_WINDOWS, device=device)).noise(L)
            items_BL[0, 0] = PAD
            # A number that no other size has: what is equal here would be taken to be the same.
            rows_M = torch.arange(1, 2 * L + 2, device=device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                hidden_MD = model.mix(x_BLD, items_BL, seconds_BL2, noise, rows_M)
            torch.autograd.backward(hidden_MD.float().sum())
    finally:
        model.train(was_training)


def _describe(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.:') if lines else 'no reason given'}"

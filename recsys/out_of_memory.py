"""Failures for want of memory, told apart from others, and what a training can do about them."""

import contextlib
from collections.abc import Iterator

import torch

from recsys.errors import OutOfMemoryError

_WORDS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, of torch's CPU allocator, which raises a plain RuntimeError, or of Python."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in _WORDS
    )


@contextlib.contextmanager
def explain_out_of_memory(place: str, advice: str) -> Iterator[None]:
    """Raises: OutOfMemoryError where memory runs out within the block, as a sentence: where that
    was, what the device said, and what to do. Other errors stay as they are.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"{place} ({first_line(error)}); {advice}.") from error


def advise_less(batch_size: int, micro_batches: int, world_size: int) -> str:
    """The settings that halve the activations of a step, for the end of a sentence. Each part of a
    batch keeps a window.
    """
    parts = min(2 * micro_batches, batch_size // world_size)
    advice = []
    if parts > micro_batches:
        advice.append(
            f"raise trainer.micro_batches to {parts} (now {micro_batches}), which changes no result"
        )
    if batch_size // 2 >= micro_batches * world_size:
        # A resumed run keeps its recipe.
        advice.append(f"lower batch_size to {batch_size // 2} (now {batch_size}) in a new run")
    return ", or ".join(advice or ["train a smaller model"])


def first_line(error: BaseException) -> str:
    """What an error says, without its details."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")

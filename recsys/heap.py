"""The heap that the C library keeps for a process."""

import ctypes
import os
import time
from collections.abc import Callable

_EVERY_S = 60.0
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_NUM_KERNELS = 64


class Heap:
    """Gives back what lies free in the heap, now and then.

    Batches of ever new shapes leave holes between what lives long, and glibc returns none of them
    by itself: a training on a CPU grew by half in 20 epochs. It costs the time in which the pages
    are faulted in again, under 1 % at this distance. Of other C libraries nothing is asked.

    Args:
        clock: seconds from any origin.
    """

    def __init__(
        self, every_s: float = _EVERY_S, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._every_s, self._clock = every_s, clock
        self._trimmed_at = clock()
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    @staticmethod
    def bound_kernels() -> None:
        """Lets oneDNN and torch keep the kernels of 64 shapes instead of 1,024, unless the
        environment says otherwise. The number of scored positions is new at every step, so kernels
        of old ones are seldom used again; they live long, in the midst of the holes. It has an
        effect in a process that has multiplied nothing yet.
        """
        for name in _CACHES:
            os.environ.setdefault(name, str(_NUM_KERNELS))

    def tend(self) -> bool:
        """Trims when it is time, and says whether it did. It changes no value."""
        if self._trim is None or self._clock() - self._trimmed_at < self._every_s:
            return False
        self._trim(0)
        self._trimmed_at = self._clock()
        return True

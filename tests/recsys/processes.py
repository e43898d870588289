"""Ranks of a training as processes of a test, over gloo."""

import datetime
import faulthandler
import os
from pathlib import Path

import torch
import torch.distributed as dist

_PATIENCE_S = 120


def join_ranks(folder: str, rank: int, world_size: int) -> None:
    """Makes this process a rank. One that hangs shows where, on standard error, and ends."""
    faulthandler.dump_traceback_later(2 * _PATIENCE_S, exit=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=_PATIENCE_S),
    )


def leave_ranks(told: object, path: Path) -> None:
    """Writes what a rank has to tell and ends its process.

    Without taking the group apart: a process has been seen to wait for ever in that, after both
    ranks had told everything.
    """
    torch.save(told, path)
    dist.barrier()
    os._exit(0)

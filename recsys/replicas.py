"""A model on each of several workers, whose gradients are averaged over them."""

import contextlib

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from recsys.touched_rows import TouchedRows


def replicate(model: nn.Module, world_size: int, touched: TouchedRows | None) -> nn.Module:
    """The model as a step calls it: itself where it is alone. The rows of `touched` are exchanged
    apart from the others.
    """
    if world_size == 1:
        return model
    if touched is not None:
        tables = [
            # DDP puts a dot before the parameters of the outermost module.
            name if "." in name else f".{name}"
            for name, parameter in model.named_parameters()
            if any(parameter is table for table in touched.tables)
        ]
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, tables)  # type: ignore[no-untyped-call]
    # Buffers never change; the attributes of millions of items would travel at each step. Gradients
    # that are views of what is exchanged spare a second copy of the item table.
    return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)


def without_exchange(replica: nn.Module) -> contextlib.AbstractContextManager[None]:
    """In here gradients add up on each worker and wait for the exchange of a later pass."""
    if isinstance(replica, DistributedDataParallel):
        return replica.no_sync()
    return contextlib.nullcontext()

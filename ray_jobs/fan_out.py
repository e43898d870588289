"""Ray Data over rows of which each is a task of its own, such as the buckets of a table."""

from collections.abc import Sequence
from typing import Any

import ray.data


def one_block_each(rows: Sequence[dict[str, Any]]) -> ray.data.Dataset:
    """A data set with a block a row, for one function that is mapped over it with `batch_size=1`;
    what all tasks give back must fit into the object store.

    All tasks are handed to Ray at once, which starts one the moment that a CPU is free. Ray Data by
    itself hands over as many as there are CPUs and looks now and then whether one has ended: tasks
    of 0.3 s took 1.4 to 2 times as long. It does so for the operators that may follow and for what
    their inputs take in memory; do not build a pipeline of several on this.
    """
    dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    # A copy: other data sets keep their settings.
    dataset.context.op_resource_reservation_enabled = False
    return dataset

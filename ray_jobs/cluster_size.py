"""What a job may count on: what the cluster has, or may grow to.

Ray says what the machines have that are there now. A cluster that starts them on demand says by
`NEXTITEM_CLUSTER_CPUS` and `NEXTITEM_CLUSTER_GPUS` how far it goes; Ray's own way to ask for that
(`ray.autoscaler`) knows what was asked for, not what would be granted.
"""

import math
import os

import ray

from ray_jobs.errors import JobError

_MOST = {"CPU": "NEXTITEM_CLUSTER_CPUS", "GPU": "NEXTITEM_CLUSTER_GPUS"}
_TYPE = "accelerator_type:"


def reachable(resource: str) -> float:
    """CPUs or GPUs of the cluster, once it has grown. Raises: JobError."""
    return max(present(resource), _most(resource))


def present(resource: str) -> float:
    """Those that are there now."""
    return float(ray.cluster_resources().get(resource, 0))


def refuse_absent_accelerator(accelerator_type: str) -> None:
    """Raises: JobError when the cluster has all its GPUs and none of them is of that type."""
    if _most("GPU") > present("GPU"):
        return  # of what type the others are is known when they come
    names = sorted(name.removeprefix(_TYPE) for name in ray.cluster_resources() if _TYPE in name)
    if accelerator_type not in names:
        raise JobError(
            f"train.accelerator_type is {accelerator_type!r}, and the cluster's types are "
            f"{', '.join(names) or 'none'}; name one of these, or leave it out."
        )


def _most(resource: str) -> float:
    text = os.environ.get(_MOST[resource], "0")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise JobError(f"{_MOST[resource]} is {text!r}; give a number, the most that may be there.")
    return number

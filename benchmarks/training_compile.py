"""What torch.compile saves of a training, for `benchmarks.training`: our trainer with compiled
blocks and without, taking turns an epoch each, in one process.
"""

from dataclasses import replace
from statistics import median
from typing import Any

import torch

from benchmarks.published import read_dataset
from benchmarks.training_cases import find_case
from benchmarks.training_sides import Plan, make_trainer
from recsys.trainer import Trainer


def measure_compile(plan: Plan) -> dict[str, Any]:
    """Seconds of an epoch of the case bert4rec, medians of `plan.epochs`, and `saved`, the share of
    the eager epoch that the compiled one does without; or why the blocks cannot be compiled.

    Each side trains one epoch before, which is not counted: it compiles what the try before the
    training did not meet.
    """
    torch.set_num_threads(plan.threads)
    case = find_case("bert4rec", quick=plan.quick)
    dataset = read_dataset(case.dataset)
    longer = replace(plan, epochs=plan.epochs + 1)
    trainers = {
        name: make_trainer(case, dataset, longer, "auto", compiled=name == "compiled")
        for name in ("eager", "compiled")
    }
    reason = trainers["compiled"].eager_because
    if reason:
        return {"is_measured": False, "reason": reason}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(longer.epochs):
        for name, trainer in trainers.items():
            seconds[name].append(_train_epoch_s(trainer))
    eager_s, compiled_s = (median(of_side[1:]) for of_side in seconds.values())
    return {
        "is_measured": True,
        "recipe": trainers["eager"].recipe.name,
        "dataset": case.dataset,
        "dtype": str(trainers["eager"].dtype).removeprefix("torch."),
        "epochs": plan.epochs,
        "threads": plan.threads,
        "eager_epoch_s": round(eager_s, 2),
        "compiled_epoch_s": round(compiled_s, 2),
        "saved": round(1 - compiled_s / eager_s, 4),
    }


def _train_epoch_s(trainer: Trainer) -> float:
    """Seconds of an epoch without its validation."""
    windows = trainer.steps_per_epoch * trainer.recipe.batch_size
    return windows / trainer.train_epoch().windows_per_s

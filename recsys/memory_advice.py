"""What to set where a training does not fit into memory: the least change of the result that does,
found by planning again with every setting that needs less.
"""

import contextlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError

from recsys.errors import TrainingError
from recsys.memory_plan import MemoryPlan, Workload, plan_memory
from recsys.recipe import Recipe

_RECIPE = "train.overrides."
_MICRO_BATCHES = "train.trainer.micro_batches"
_PRECISION = "train.trainer.precision"
_BATCH_SIZE = f"{_RECIPE}batch_size"
_LEAST_BATCH = 16
"""Smaller batches hardly learn."""
_GB = 1e9


@dataclass(frozen=True)
class Suggestion:
    """Settings that make a training fit together, and what it would need then."""

    settings: Mapping[str, Any]
    """Values by their names in a configuration."""
    plan: MemoryPlan

    def __str__(self) -> str:
        settings = " with ".join(f"{name} = {_toml(it)}" for name, it in self.settings.items())
        return f"{settings} ({self.plan.total_bytes / _GB:.2f} GB)"


def refuse_what_cannot_fit(recipe: Recipe, workload: Workload, available_bytes: int) -> MemoryPlan:
    """The plan. Raises: TrainingError with its figures, and with the settings that would fit."""
    plan = plan_memory(recipe, workload)
    if plan.total_bytes <= available_bytes:
        return plan
    found = suggest_settings(recipe, workload, available_bytes)
    if found:
        advice = f"{' or '.join(map(str, found))} would fit"
    else:
        least_bytes = min(_plan_strongest(recipe, workload).values(), default=plan.total_bytes)
        advice = (
            f"with all settings that save memory it would still need {least_bytes / _GB:.2f} GB: "
            "use a larger device or a smaller model"
        )
    raise TrainingError(
        f"Training would need {plan} where {available_bytes / _GB:.2f} GB are free; {advice}."
    )


def suggest_settings(recipe: Recipe, workload: Workload, available_bytes: int) -> list[Suggestion]:
    """The two single settings that fit and change the result least; where fewer than two do alone,
    as few as possible of the others together beside it. Empty when nothing fits.
    """
    needs = _plan_strongest(recipe, workload)
    fitting = [names for names, needed in needs.items() if needed <= available_bytes]
    singles = [names for names in fitting if len(names) == 1][:2]
    alone = {name for names in singles for name in names}
    others = [names for names in fitting if len(names) > 1 and alone.isdisjoint(names)]
    chosen = [*singles, *others[:1]][:2]
    return [_mildest(names, recipe, workload, available_bytes) for names in chosen]


def apply_settings(
    recipe: Recipe, workload: Workload, settings: Mapping[str, Any]
) -> tuple[Recipe, Workload]:
    """Raises: ValidationError when the settings do not go together."""
    content = recipe.model_dump(exclude_unset=True)
    for name, value in settings.items():
        if name == _MICRO_BATCHES:
            workload = replace(workload, micro_batches=value)
        elif name == _PRECISION:
            workload = replace(workload, dtype=torch.bfloat16)
        else:
            section = content
            *parents, leaf = name.removeprefix(_RECIPE).split(".")
            for parent in parents:
                section = section.setdefault(parent, {})
            section[leaf] = value
    return Recipe.model_validate(content), workload


def _choices(recipe: Recipe, workload: Workload) -> dict[str, list[Any]]:
    """Settings that need less, the least change of the result first, each with its values from the
    mildest to the strongest. More workers are none of them: they need no less than as many micro
    batches do.
    """
    loss, batch_size = recipe.loss, recipe.batch_size
    is_full = loss.kind == "full-softmax"
    least_batch = max(_LEAST_BATCH, workload.num_workers * workload.micro_batches)
    batch_sizes = _halved(batch_size, least_batch)
    # As many as there are windows in a worker's part of each of these sizes.
    most_parts = [size // workload.num_workers for size in (batch_size, *batch_sizes)]
    lengths = [n for n in (8, 4, 2) if recipe.model.dim % n == 0]
    has_vectors = recipe.model.item_codes is None and recipe.item_start == "random"
    can_code = has_vectors and not workload.has_weights
    choices: dict[str, list[Any]] = {
        _MICRO_BATCHES: _doubled(workload.micro_batches, most_parts),
        f"{_RECIPE}loss.block_size": [n for n in (16, 4, 1) if n < (loss.block_size or 64)]
        if is_full
        else [],
        _PRECISION: ["bf16"] if workload.dtype == torch.float32 and workload.has_bf16 else [],
        _BATCH_SIZE: batch_sizes,
        f"{_RECIPE}optimiser.item_rows": ["touched"] * (recipe.optimiser.item_rows == "all"),
        f"{_RECIPE}loss.negatives.num": [] if is_full else _halved(loss.negatives.num, 16),
        # A section of its own: what the former loss had may be unknown to this one.
        f"{_RECIPE}loss": [{"kind": "sampled-softmax"}] * is_full,
        f"{_RECIPE}model.item_codes": [{"length": n} for n in lengths[:1] if can_code],
    }
    return {name: values for name, values in choices.items() if values}


def _plan_strongest(recipe: Recipe, workload: Workload) -> dict[tuple[str, ...], int]:
    """Bytes that are needed with the strongest values of any settings that go together: few before
    many, and those first whose last one changes the result least.
    """
    choices = _choices(recipe, workload)
    names, needs = list(choices), {}
    for number in range(1, len(names) + 1):
        places = itertools.combinations(range(len(names)), number)
        for chosen in sorted(places, key=lambda some: some[::-1]):
            settings = {names[place]: choices[names[place]][-1] for place in chosen}
            if {_MICRO_BATCHES, _BATCH_SIZE} <= settings.keys():
                settings[_MICRO_BATCHES] = settings[_BATCH_SIZE] // workload.num_workers
            # Settings that do not go together are no choice.
            with contextlib.suppress(ValidationError):
                plan = plan_memory(*apply_settings(recipe, workload, settings))
                needs[tuple(settings)] = plan.total_bytes
    return needs


def _mildest(
    names: tuple[str, ...], recipe: Recipe, workload: Workload, available_bytes: int
) -> Suggestion:
    """The mildest values of settings whose strongest ones fit together."""
    choices = _choices(recipe, workload)
    # What changes the result least goes to its strongest value first.
    for values in itertools.product(*(choices[name] for name in reversed(names))):
        settings = dict(zip(names, reversed(values), strict=True))
        other = apply_settings(recipe, workload, settings)
        plan = plan_memory(*other)
        if plan.total_bytes <= available_bytes and _can_share(*other):
            return Suggestion(settings, plan)
    raise AssertionError(f"{names} fit and have no values that do")


def _can_share(recipe: Recipe, workload: Workload) -> bool:
    """Whether there is a window for each part of a batch."""
    return recipe.batch_size >= workload.num_workers * workload.micro_batches


def _doubled(start: int, others: list[int]) -> list[int]:
    """What is above `start`, up to the largest of the others, and these."""
    powers = itertools.takewhile(lambda n: n < max(others), (start << k for k in itertools.count()))
    return sorted({n for n in (*powers, *others) if n > start})


def _halved(start: int, least: int) -> list[int]:
    """What is below `start`, down to `least`."""
    return list(itertools.takewhile(lambda n: n >= least, (start >> k for k in range(1, 64))))


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(it)}' for key, it in value.items())} }}"
    return json.dumps(value)

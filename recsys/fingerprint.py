"""What a training must keep the same to go on from its checkpoints, however it is resumed.

How long to train, when to validate, in how many parts and on how many workers may change.
"""

from typing import Any

from recsys.recipe import Recipe
from recsys.splits import Split
from recsys.targets import TargetEvents
from recsys.tokens import TokenStore


def take_fingerprint(
    recipe: Recipe,
    seed: int,
    store: TokenStore,
    split: Split,
    targets: TargetEvents | None,
    *,
    num_windows: int,
) -> dict[str, Any]:
    """Values by the names that a person knows them by."""
    num_events_U = split.train_end_U - store.offsets_U[:-1]
    return {
        **_flatten(recipe.model_dump(mode="json")),
        "seed": seed,
        "targets": None if targets is None else [targets.field, *targets.weights_V.tolist()],
        "the number of training windows": num_windows,
        "the number of training events": int(num_events_U.sum()),
    }


def refuse_another(began: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises: ValueError that names what differs. A setting of the recipe that is newer than the
    training was at its default there.
    """
    defaults = _flatten(Recipe(name="").model_dump(mode="json"))
    newer = now.keys() - began.keys()
    began = began | {name: defaults[name] for name in newer if name in defaults}
    changes = [
        f"{name} was {began.get(name)} and is {now.get(name)}"
        for name in sorted(began.keys() | now.keys())
        if began.get(name) != now.get(name)
    ]
    if changes:
        raise ValueError("; ".join(changes))


def _flatten(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_section = isinstance(value, dict) and value
        flat |= _flatten(value, f"{before}{name}.") if is_section else {f"{before}{name}": value}
    return flat

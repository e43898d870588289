"""A recipe: the choices and sizes that make one model of the family, as a TOML file."""

import tomllib
from importlib import resources
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from recsys.batches import ObjectiveConfig
from recsys.losses import LossConfig
from recsys.model_config import ModelConfig
from recsys.optimiser import OptimiserConfig

_OBJECTIVES = {
    "bidirectional": ("masked-item",),
    "causal": ("next-item", "recency-sampling"),
}


class Recipe(BaseModel):
    """Model, objective, loss and optimiser; every paper's method is a choice of these."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    loss: LossConfig = LossConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    batch_size: int = Field(256, ge=1)
    """Windows in a global batch, over all workers."""
    item_start: Literal["random", "spectral"] = "random"
    """spectral: vectors of items begin near one another where the items stand near one another in
    training, see `recsys.item_start`. Sparse logs gain much. A model that begins with published
    weights (`train.start`) keeps those."""

    @model_validator(mode="after")
    def _full_softmax_looks_at_all(self) -> "Recipe":
        if self.loss.kind == "full-softmax" and self.optimiser.item_rows == "touched":
            raise ValueError(
                "a full softmax looks at every item; set optimiser.item_rows to all, or loss.kind "
                "to sampled-softmax"
            )
        return self

    @model_validator(mode="after")
    def _codes_start_by_themselves(self) -> "Recipe":
        if self.model.item_codes is not None and self.item_start != "random":
            raise ValueError(
                "items with model.item_codes have no vectors of their own that could begin "
                "anywhere; leave item_start out"
            )
        return self

    @model_validator(mode="after")
    def _objective_fits_attention(self) -> "Recipe":
        wanted = _OBJECTIVES[self.model.attention]
        if self.objective.kind not in wanted:
            raise ValueError(
                f"{self.model.attention} attention learns {' or '.join(wanted)}, not "
                f"{self.objective.kind}; the other way round the target would be visible or the "
                "mask never trained"
            )
        return self


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("recsys") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir())


def read_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """A built-in recipe with single values replaced, e.g. `{"model": {"dim": 64}}`.

    A section that is given another `kind` begins anew, without the parameters of the former one.
    Raises: ValueError for an unknown recipe or key.
    """
    if name not in builtin_recipes():
        raise ValueError(f"unknown recipe {name!r}; there are: {', '.join(builtin_recipes())}")
    text = (resources.files("recsys") / "recipes" / f"{name}.toml").read_text()
    return Recipe.model_validate(_merged(tomllib.loads(text), overrides or {}))


def merge_overrides(
    name: str, overrides: dict[str, Any], changes: dict[str, Any]
) -> dict[str, Any]:
    """Overrides of a built-in recipe with further ones on top.

    Raises: ValueError for an unknown recipe or key.
    """
    recipe = read_recipe(name, overrides)
    kept = {
        section: values
        for section, values in overrides.items()
        if not _is_of_another_kind(_kind(recipe, section), changes.get(section))
    }
    return _merged(kept, changes)


def _kind(recipe: Recipe, section: str) -> str | None:
    kind: str | None = getattr(getattr(recipe, section), "kind", None)
    return kind


def _is_of_another_kind(before: Any, change: Any) -> bool:
    kind = change.get("kind") if isinstance(change, dict) else None
    return kind is not None and kind != before


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        before = base.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            kind = before.get("kind", value.get("kind"))
            merged[key] = value if _is_of_another_kind(kind, value) else _merged(before, value)
        else:
            merged[key] = value
    return merged

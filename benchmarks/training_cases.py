"""What `benchmarks.training` trains beside RecTools: each case as a recipe of ours and as the
options of the peer's model, made from one another so that they cannot differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from recsys.recipe import Recipe, read_recipe


@dataclass(frozen=True)
class Case:
    """A recipe, and what stands for it in RecTools."""

    recipe: str
    overrides: Mapping[str, Any]
    peer: Literal["BERT4RecModel", "SASRecModel"]
    peer_block: Literal["pre-norm", "own"] = "pre-norm"
    """pre-norm: attention, then GELU four times as wide, as ours. own: the default of SASRecModel,
    whose ReLU is as wide as the model, so that it multiplies less."""
    dataset: str = "ml-1m.txt"

    def read_recipe(self) -> Recipe:
        """The recipe with its overrides."""
        return read_recipe(self.recipe, dict(self.overrides))


# RecTools keeps its rate; one that falls to nothing in three epochs would compare schedules.
_CONSTANT_RATE = {"warmup_share": 0.0, "final_share": 1.0}
_SASREC = {
    "model": {"dim": 128, "num_layers": 2, "num_heads": 1, "max_len": 200},
    "optimiser": _CONSTANT_RATE,
}
# RecTools masks every window alike, so ours hides no last item of its own.
_BERT4REC = {"batch_size": 256, "objective": {"last_prob": 0.0}, "optimiser": _CONSTANT_RATE}
CASES = {
    "bert4rec": Case("bert4rec-production", _BERT4REC, "BERT4RecModel"),
    "sasrec": Case("sasrec-ce", _SASREC, "SASRecModel"),
    "sasrec-own-block": Case("sasrec-ce", _SASREC, "SASRecModel", "own"),
}
QUICK_DATASET = "small-shop"


def find_case(name: str, *, quick: bool = False) -> Case:
    """A case as it is; or a small one, on a synthetic shop, that is trained in seconds."""
    case = CASES[name]
    if not quick:
        return case
    model = {**case.overrides.get("model", {}), "dim": 32, "num_layers": 1, "num_heads": 1}
    overrides = {**case.overrides, "batch_size": 32, "model": model}
    return replace(case, dataset=QUICK_DATASET, overrides=overrides)


def peer_options(case: Case, recipe: Recipe) -> dict[str, Any]:
    """Arguments of the peer's model. Raises: ValueError for a loss that the peer would compute
    otherwise.
    """
    if recipe.loss.kind != "full-softmax":
        raise ValueError(
            f"{recipe.name} learns by {recipe.loss.kind}, which RecTools draws its own negatives "
            "for; compare a recipe with full-softmax."
        )
    model = recipe.model
    options = {
        "n_factors": model.dim,
        "n_blocks": model.num_layers,
        "n_heads": model.num_heads,
        "session_max_len": model.max_len,
        "dropout_rate": model.dropout,
        "batch_size": recipe.batch_size,
        "lr": recipe.optimiser.learning_rate,
        "loss": "softmax",
    }
    if case.peer == "BERT4RecModel":
        options["mask_prob"] = recipe.objective.mask_prob
    return options

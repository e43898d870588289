"""The weights of a published model, carried over to a vocabulary that has grown: more items, fewer
items, new values of context fields and attributes.

Rows are matched by what they stand for (item id, value, band), never by their index. What is new
starts where it is plausible: an item from its attributes, a value from its field's unknown code.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor

from recsys.artifact import Artifact
from recsys.attributes import AttributeEncoder, AttributesConfig
from recsys.catalogue import NUM_SPECIAL, Catalogue
from recsys.context import ContextConfig, ContextEncoder
from recsys.errors import ArtifactError
from recsys.kinds import find_kinds, mean_of_kind
from recsys.model_config import ModelConfig

_NOISE = 0.01
"""Standard deviation of what tells new items of one kind apart, as a share of the table's own."""

_CONTEXT_ROWS = ("context.table.weight", "request.table.weight")
_ATTRIBUTE_ROWS = (
    "items.attributes.weight",
    "outputs.attributes.weight",
    "attribute_bias.attributes",
)
_ITEM_ROWS = ("items.weight", "outputs.weight", "item_bias")
_ITEM_CODES = ("items.codes", "outputs.codes")


def refuse_other_architecture(
    artifact: Artifact, model: ModelConfig, context: ContextConfig, attributes: AttributesConfig
) -> None:
    """Raises: ArtifactError that names every difference between what the artifact's weights were
    trained for and this configuration.
    """
    before = ModelConfig.model_validate(artifact.config["model"])
    differences = [
        *_differences("model", before, model),
        *_differences("context", artifact.context.config, context),
        *_differences(
            # How many values and bands there are may change: they are matched one by one.
            "attributes",
            artifact.attributes.config,
            attributes,
            exclude={"max_values", "num_bands"},
        ),
    ]
    if differences:
        raise ArtifactError(
            f"Version {artifact.version} cannot be the start of this model: "
            f"{', '.join(differences)}; configure the same, or train from scratch."
        )


def grow_weights(
    artifact: Artifact,
    catalogue: Catalogue,
    context: ContextEncoder,
    attributes: AttributeEncoder,
    *,
    seed: int,
) -> dict[str, Tensor]:
    """The state of a model of the artifact's architecture over another vocabulary.

    Trained items keep their rows. An item that is new, or that the artifact knows without a
    training event, has an id part of zero in a model with attributes, which carry it then; in a
    model without it starts as the mean of its kind (`recsys.kinds`), with a little noise.

    Raises: ArtifactError when the item ids are of another type, or none is known.
    """
    weights = load_file(artifact.path / "model.safetensors")
    kept_I = match_items(artifact, catalogue)
    fill = _fill_zeros if attributes.config.fields else _fill_kinds(artifact, catalogue, kept_I)
    context_rows = torch.from_numpy(match_context(artifact.context, context))
    attribute_rows = torch.from_numpy(match_attributes(artifact.attributes, attributes))
    generator = torch.Generator().manual_seed(seed)

    grown = {}
    for name, weight in weights.items():
        if name in _ITEM_CODES:
            centroids = weights[name.replace("codes", "centroids")]
            grown[name] = _grow_codes(weight, centroids, kept_I, fill, generator)
        elif name in _ITEM_ROWS:
            grown[name] = _grow_items(weight, kept_I, fill, generator)
        elif name in _CONTEXT_ROWS:
            grown[name] = weight[context_rows]
        elif name in _ATTRIBUTE_ROWS:
            grown[name] = weight[attribute_rows]
        else:
            grown[name] = weight
    return grown


def match_items(artifact: Artifact, catalogue: Catalogue) -> np.ndarray:
    """The artifact's row of each row of the catalogue, int64 `[I]`; -1 where it has none that was
    trained. Raises: ArtifactError.
    """
    known, ids = artifact.catalogue, catalogue.item_ids
    if ids.type != known.item_ids.type:
        raise ArtifactError(
            f"Version {artifact.version} cannot be the start of this model: its item ids are "
            f"{known.item_ids.type}, those of the sequences {ids.type}."
        )
    rows = known.encode(ids).astype(np.int64)
    # Padding is no item and has no count, so what is not known falls out here, too.
    is_trained = known.counts_I[rows] > 0
    if not is_trained.any():
        raise ArtifactError(
            f"Version {artifact.version} cannot be the start of this model: it was trained on none "
            f"of the {catalogue.num_items} items of the sequences; start from a version of this "
            "shop."
        )
    return np.concatenate([np.arange(NUM_SPECIAL), np.where(is_trained, rows, -1)])


def match_context(before: ContextEncoder, after: ContextEncoder) -> np.ndarray:
    """The code of `before` for each code of `after`, as rows of a `ContextEmbedding`, int64."""
    fields = [
        _match_values(before.vocabularies[name], after.vocabularies[name])
        for name in after.config.categorical
    ]
    times = [np.arange(size) for size in after.sizes[len(fields) :]]
    return _stack([*fields, *times], before.sizes)


def match_attributes(before: AttributeEncoder, after: AttributeEncoder) -> np.ndarray:
    """The code of `before` for each code of `after`, int64: values as they are, of a band the one
    in which its middle lay.
    """
    fields = [
        _match_values(before.vocabularies[name], after.vocabularies[name])
        for name in after.config.categorical
    ]
    bands = [_match_bands(before.edges[name], after.edges[name]) for name in after.config.bands]
    return _stack([*fields, *bands], before.sizes)


_Fill = Callable[[Tensor, torch.Generator], Tensor]
"""From a table `[I, D]` of the artifact to the rows of what is new, `[N, D]` or `[1, D]`."""


def _grow_items(
    weight: Tensor, kept_I: np.ndarray, fill: _Fill, generator: torch.Generator
) -> Tensor:
    # Biases are a table of width one.
    table_ID = weight.view(len(weight), -1)
    is_kept_I = torch.from_numpy(kept_I >= 0)
    grown_ID = table_ID.new_empty(len(kept_I), table_ID.shape[1])
    grown_ID[is_kept_I] = table_ID[torch.from_numpy(kept_I)[is_kept_I]]
    grown_ID[~is_kept_I] = fill(table_ID, generator)
    return grown_ID.view(-1, *weight.shape[1:])


def _grow_codes(
    codes_IC: Tensor,
    centroids_CVE: Tensor,
    kept_I: np.ndarray,
    fill: _Fill,
    generator: torch.Generator,
) -> Tensor:
    """A new item takes the codes whose centroids are nearest to where its vector would start."""
    C, _, E = centroids_CVE.shape
    table_ID = centroids_CVE[torch.arange(C), codes_IC.long()].flatten(1)
    is_kept_I = torch.from_numpy(kept_I >= 0)
    grown_IC = codes_IC.new_empty(len(kept_I), C)
    grown_IC[is_kept_I] = codes_IC[torch.from_numpy(kept_I)[is_kept_I]]
    wanted_CNE = fill(table_ID, generator).view(-1, C, E).transpose(0, 1)
    grown_IC[~is_kept_I] = torch.cdist(wanted_CNE, centroids_CVE).argmin(2).T.to(codes_IC.dtype)
    return grown_IC


def _fill_zeros(table_ID: Tensor, _: torch.Generator) -> Tensor:
    return torch.zeros_like(table_ID[:1])


def _fill_kinds(artifact: Artifact, catalogue: Catalogue, kept_I: np.ndarray) -> _Fill:
    trained = np.flatnonzero(artifact.catalogue.counts_I)
    kinds = find_kinds(artifact.catalogue, trained, catalogue, np.flatnonzero(kept_I < 0))

    def fill(table_ID: Tensor, generator: torch.Generator) -> Tensor:
        means_ND = mean_of_kind(kinds, table_ID)
        noise_ND = torch.randn(means_ND.shape, generator=generator)
        return means_ND + _NOISE * table_ID[trained].std() * noise_ND

    return fill


def _match_values(before: Sequence[str], after: Sequence[str]) -> np.ndarray:
    codes = {value: code for code, value in enumerate(before, start=1)}
    return np.array([0, *(codes.get(value, 0) for value in after)], np.int64)


def _match_bands(before: Sequence[float], after: Sequence[float]) -> np.ndarray:
    edges = np.asarray(after)
    # The outermost bands have no middle and stay outermost; without an edge there is one band.
    middles = np.concatenate([[-np.inf], (edges[1:] + edges[:-1]) / 2, [np.inf]])[: len(edges) + 1]
    return np.concatenate([[0], 1 + np.searchsorted(before, middles, side="right")])


def _stack(fields: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    starts = [0, *accumulate(sizes)][:-1]
    codes = [start + codes for start, codes in zip(starts, fields, strict=True)]
    return np.concatenate([np.zeros(0, np.int64), *codes])


def _differences(
    section: str, before: BaseModel, after: BaseModel, exclude: set[str] | None = None
) -> list[str]:
    values: list[dict[str, Any]] = [
        config.model_dump(mode="json", exclude=exclude) for config in (before, after)
    ]
    return [
        f"{section}.{name} is {values[0][name]!r} there and {value!r} here"
        for name, value in values[1].items()
        if values[0][name] != value
    ]

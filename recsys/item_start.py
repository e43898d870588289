"""Where item vectors begin: at random, or where the items stand beside one another.

A sparse log says little of an item, and a model that begins at random spends most of it on finding
out which items belong together. What is seen side by side tells that beforehand: the leading
eigenvectors of the normalised graph of neighbours (Ng, Jordan & Weiss, 2001, "On Spectral
Clustering"), with the mean degree added to all degrees, so that they are not spent on the small
islands that a sparse graph has many of (Zhang & Rohe, 2018, arXiv:1806.01468).
"""

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

from recsys.catalogue import Catalogue
from recsys.covisitation import find_neighbours
from recsys.eigenvectors import leading_eigenvectors
from recsys.interactions import training_positions
from recsys.item_codes import agree_on_codes
from recsys.model import NextItemModel
from recsys.ranks import agree_on
from recsys.recipe import Recipe
from recsys.splits import Split
from recsys.tokens import TokenStore

_NEIGHBOURS = 100
"""Neighbours of an item, the strongest."""


def agree_on_vectors(
    store: TokenStore, split: Split, num_rows: int, dim: int, *, seed: int, device: torch.device
) -> Tensor:
    """`spectral_vectors` by the first rank, which gives them to the others: every rank calls it."""
    return agree_on(
        lambda: spectral_vectors(store, split, num_rows, dim, seed=seed, device=device),
        torch.zeros(num_rows, dim),
        device,
    )


def prepare_items(
    model: NextItemModel,
    recipe: Recipe,
    store: TokenStore,
    split: Split,
    catalogue: Catalogue,
    *,
    seed: int,
    device: torch.device,
) -> None:
    """Gives a new model what is learned of its items before training: codes, and vectors that do
    not begin at random. Every rank calls it.
    """
    if recipe.model.item_codes is not None:
        codes = recipe.model.item_codes
        model.load_codes(agree_on_codes(codes, store, split, catalogue, seed=seed, device=device))
    if recipe.item_start == "spectral":
        sizes = catalogue.num_rows, recipe.model.dim
        model.start_items(agree_on_vectors(store, split, *sizes, seed=seed, device=device))


def spectral_vectors(
    store: TokenStore, split: Split, num_rows: int, dim: int, *, seed: int, device: torch.device
) -> Tensor:
    """Directions of length 1, fp32 `[I, D]`, near one another for items that stand near one another
    in training; zero for items without a neighbour, as new ones are.

    A catalogue with fewer rows than `dim` leaves the last columns zero.
    """
    graph_II = _normalised_graph(store, split, num_rows)
    vectors_IE = leading_eigenvectors(graph_II, dim, seed=seed, device=device)
    vectors_IE[torch.from_numpy(np.diff(graph_II.indptr) == 0).to(device)] = 0
    directions_IE = F.normalize(vectors_IE, dim=1)
    return F.pad(directions_IE, (0, dim - directions_IE.shape[1]))


def _normalised_graph(store: TokenStore, split: Split, num_rows: int) -> sparse.csr_array:
    """Symmetric weights of neighbours over the roots of both degrees, fp32 `[I, I]`."""
    weights_II = find_neighbours(store, split, num_rows, limit=_NEIGHBOURS, backward=1.0)
    items_T = store.items_T[training_positions(store, split)]
    counts_I = np.bincount(items_T, minlength=num_rows).astype(np.float32)
    # Shares of an item's own events become weights of pairs, the same from both ends.
    weights_II.data *= np.repeat(counts_I, np.diff(weights_II.indptr))
    graph_II: sparse.csr_array = (weights_II + weights_II.T).tocsr()
    degrees_I = np.asarray(graph_II.sum(axis=1)).ravel()
    mean = degrees_I[degrees_I > 0].mean() if degrees_I.any() else 1.0
    scale_I = 1 / np.sqrt(degrees_I + mean)
    graph_II.data *= np.repeat(scale_I, np.diff(graph_II.indptr))
    graph_II.data *= scale_I[graph_II.indices]
    return graph_II

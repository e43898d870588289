"""A published version on the targets of another one, as it would have served them: with its own
catalogue, it reads no item that it does not know and recommends none.
"""

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from recsys.artifact import Artifact
from recsys.catalogue import NUM_SPECIAL, PAD, Catalogue
from recsys.encoders import Encoder
from recsys.evaluation import rank_targets
from recsys.export import sample_inputs
from recsys.model import NextItemModel
from recsys.scorer import ModelScorer
from recsys.tokens import TokenStore

_TOP_K = 10


def find_known_targets(
    store: TokenStore, catalogue: Catalogue, targets_N: np.ndarray, other: Catalogue
) -> np.ndarray:
    """Where the targets stand in the same sequences read with another catalogue, which leaves out
    what it does not know, int64 `[N]`; -1 where the target itself is left out.
    """
    is_known_I = other.encode(catalogue.item_ids) != PAD
    is_known_T = is_known_I[store.items_T - NUM_SPECIAL]
    before_T = np.cumsum(is_known_T) - is_known_T
    return np.where(is_known_T[targets_N], before_T[targets_N], -1)


def rank_as_served(
    artifact: Artifact,
    store: TokenStore,
    users_N: np.ndarray,
    targets_N: np.ndarray,
    *,
    num_rows: int,
    filter_seen: bool,
    device: torch.device,
) -> np.ndarray:
    """Rank of each target under a published version, int64 `[N]`, from 1.

    A target that the version does not know stands behind every item. A user of whom it knows no
    event before the target is given what is popular, as by serving.

    Args:
        store: the sequences as the version reads them.
        targets_N: of `find_known_targets`.
        num_rows: of the larger catalogue that the targets come from.
    """
    ranks_N = np.full(len(users_N), num_rows, np.int64)
    is_known_N = targets_N >= 0
    has_history_N = targets_N > store.offsets_U[users_N]
    ranked_N = is_known_N & has_history_N
    if ranked_N.any():
        model = artifact.load_model().materialised().to(device)
        scorer = ModelScorer(model, artifact.context.known_at_request_F, name=artifact.version)
        where = store, users_N[ranked_N], targets_N[ranked_N]
        ranks_N[ranked_N] = rank_targets(scorer, *where, filter_seen=filter_seen).ranks_N
    popular_N = is_known_N & ~has_history_N
    counts_I = artifact.catalogue.counts_I
    counts_N = counts_I[store.items_T[targets_N[popular_N]]]
    ranks_N[popular_N] = (counts_I[NUM_SPECIAL:] >= counts_N[:, None]).sum(axis=1)
    return ranks_N


def make_request(
    model: NextItemModel, encode: Encoder, *, num_windows: int = 1, seed: int = 0
) -> Callable[[], Tensor]:
    """One call of a ranker with a random history: encode, score the catalogue, choose the best."""
    inputs = sample_inputs(model, num_windows=num_windows, seed=seed)

    def rank() -> Tensor:
        scores_BI = model.scores(encode(*inputs))
        return scores_BI.topk(min(_TOP_K, scores_BI.shape[1])).indices

    return rank


@torch.inference_mode()
def time_in_turn(
    calls: Sequence[Callable[[], object]],
    *,
    num_rounds: int = 60,
    num_warm: int = 5,
    clock: Callable[[], float] = perf_counter,
) -> list[float]:
    """Seconds of each call, the lower quartile of many rounds in which they take turns: what else
    runs on the machine hits all of them, and only ever adds.
    """
    for call in [*calls] * num_warm:
        call()
    seconds_RC = np.empty((num_rounds, len(calls)))
    for seconds_C in seconds_RC:
        for column, call in enumerate(calls):
            started = clock()
            call()
            seconds_C[column] = clock() - started
    return [float(seconds) for seconds in np.quantile(seconds_RC, 0.25, axis=0)]

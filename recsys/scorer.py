"""A trained model as a scorer of the whole catalogue."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recsys.context import NO_TIME, count_seconds
from recsys.model import NextItemModel, Request, append_request
from recsys.tokens import TokenStore


class ModelScorer:
    """Scores with a model, knowing the context of the request (`time-aware`) or nothing of it
    (`time-blind`). Vectors made of attributes are computed here, once: it scores with the weights
    of that moment. `encode` takes the place of its encoder, see `recsys.encoders`.
    """

    def __init__(
        self,
        model: NextItemModel,
        known_at_request_F: np.ndarray,
        *,
        name: str = "model",
        knows_request: bool = True,
        dtype: torch.dtype = torch.float32,
        encode: Callable[..., Tensor] | None = None,
    ) -> None:
        self.name = name
        self._model = model.materialised()
        self._device = model.item_bias.device
        self._known_F = torch.from_numpy(known_at_request_F)
        self._knows_request = knows_request
        self._dtype = dtype
        self._encode = encode

    @torch.no_grad()
    def score(self, store: TokenStore, users_B: np.ndarray, targets_B: np.ndarray) -> Tensor:
        """Scores fp32 `[B, I]` on the device of the model; see `evaluation.Scorer`."""
        history = gather_histories(store, users_B, targets_B, self._model.config.history_len)
        request = Request(
            torch.from_numpy(store.context_TF[targets_B]).long() * self._knows_request,
            history.request_seconds_B * self._knows_request,
        )
        inputs = append_request(
            self._model.config,
            history.items_BL,
            history.context_BLF,
            history.seconds_BL,
            request,
            self._known_F,
        )

        self._model.eval()
        moved = [tensor.to(self._device) for tensor in inputs]
        if self._encode is not None:
            return self._model.scores(self._encode(*moved))
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            hidden_BLD = self._model(*moved)
        # Rounded scores would tie, and ties count against the target.
        return self._model.scores(hidden_BLD[:, -1].float())


class Histories(NamedTuple):
    """Events before B targets, left-padded, and when the targets came."""

    items_BL: Tensor
    context_BLF: Tensor
    seconds_BL: Tensor
    request_seconds_B: Tensor


def gather_histories(
    store: TokenStore, users_B: np.ndarray, targets_B: np.ndarray, max_len: int
) -> Histories:
    """The last `max_len` events before each target."""
    starts_B = np.maximum(store.offsets_U[users_B], targets_B - max_len)
    L = int((targets_B - starts_B).max(initial=1))
    index_BL = targets_B[:, None] - L + np.arange(L)
    is_token_BL = index_BL >= starts_B[:, None]
    index_BL = np.where(is_token_BL, index_BL, 0)
    items_BL = np.where(is_token_BL, store.items_T[index_BL], 0)
    context_BLF = np.where(is_token_BL[..., None], store.context_TF[index_BL], 0)
    # One origin for all times of the batch; the column behind the histories is the targets'.
    times_BL = np.where(is_token_BL, store.timestamps_T[index_BL], NO_TIME)
    times_BL1 = np.concatenate([times_BL, store.timestamps_T[targets_B, None]], axis=1)
    seconds_BL1 = torch.from_numpy(count_seconds(times_BL1))
    return Histories(
        torch.from_numpy(items_BL).long(),
        torch.from_numpy(context_BLF).long(),
        seconds_BL1[:, :-1],
        seconds_BL1[:, -1],
    )

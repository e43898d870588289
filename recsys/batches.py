"""Objectives: which positions of gathered windows are scored, against which targets, and what is
hidden from them.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from recsys.catalogue import MASK, NUM_SPECIAL, PAD
from recsys.randomness import Draws, Purpose
from recsys.targets import TargetEvents


class ObjectiveConfig(BaseModel):
    """What the model learns to predict."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["masked-item", "next-item", "recency-sampling"] = "masked-item"
    """masked-item: hidden items from what stands around them; next-item: at each position the item
    that follows; recency-sampling: from what is left of a window the recent items that were drawn
    and taken out of it (Petrov & Macdonald, 2022, doi:10.1145/3523227.3546785)."""
    mask_prob: float = Field(0.2, gt=0, lt=1)
    """masked-item: share of a window's positions that are hidden and scored."""
    last_prob: float = Field(0.2, ge=0, le=1)
    """masked-item: share of the windows in which the last target alone is hidden and nothing stands
    after it, as when recommending.
    """
    random_share: float = Field(0.0, ge=0, lt=1)
    """masked-item: share of the hidden positions that show any item instead of the mask, so that
    what stands at a position is not to be trusted blindly (Devlin et al., 2019)."""
    kept_share: float = Field(0.0, ge=0, lt=1)
    """masked-item: share of the hidden positions that show their own item and are scored."""
    recency: float = Field(0.8, gt=0, le=1)
    """recency-sampling: a target is so many times as likely to be drawn as the one after it."""
    target_share: float = Field(0.2, gt=0, lt=1)
    """recency-sampling: at most this share of a window's targets is drawn, and one at least."""
    context_dropout: float = Field(0.1, ge=0, le=1)
    """Share of the positions that are told nothing of their request, so that a request may bring
    nothing. Each position by itself: what was known at earlier ones is known when recommending.
    """

    @model_validator(mode="after")
    def _has_its_own_parameters(self) -> "ObjectiveConfig":
        others = self.model_fields_set - _PARAMETERS[self.kind] - {"kind", "context_dropout"}
        for name in sorted(others):
            raise ValueError(f"{self.kind} has no {name}; leave it out")
        if self.random_share + self.kept_share >= 1:
            raise ValueError(
                f"random_share {self.random_share} and kept_share {self.kept_share} leave no mask; "
                "let them add up to less than 1"
            )
        return self


_PARAMETERS = {
    "masked-item": {"mask_prob", "last_prob", "random_share", "kept_share"},
    "next-item": set[str](),
    "recency-sampling": {"recency", "target_share"},
}


@dataclass(frozen=True)
class Batch:
    """Inputs of the model, and the M scored positions as flat indices into `[B * L]` with their
    targets. A position with several targets is scored as often.
    """

    items_BL: Tensor
    context_BLF: Tensor
    request_BLF: Tensor
    seconds_BL2: Tensor
    scored_M: Tensor
    targets_M: Tensor
    weights_M: Tensor | None = None
    """fp32, above 0; None where all targets weigh the same."""

    @property
    def weight(self) -> Tensor | int:
        """What the batch counts for in a mean over batches: the sum of its weights."""
        if self.weights_M is None:
            return len(self.targets_M)
        return self.weights_M.sum(dtype=torch.float64)


@dataclass(frozen=True)
class TargetWeights:
    """`TargetEvents` on a device."""

    field: int
    weights_V: Tensor
    is_weighted: bool

    @classmethod
    def of(cls, targets: TargetEvents, device: torch.device) -> "TargetWeights":
        weights_V = torch.from_numpy(targets.weights_V).to(device)
        return cls(targets.field, weights_V, targets.is_weighted)

    def weigh(self, context_BLF: Tensor) -> Tensor:
        """Weight of each event as a target, fp32 `[B, L]`; 0 where it is none."""
        return self.weights_V[context_BLF[..., self.field]]


class _Told(NamedTuple):
    """What the request for each event of a window tells."""

    fields_BLF: Tensor
    time_BL: Tensor

    def of_followers(self) -> "_Told":
        """Of all events but the first, for positions that answer the request for the next one."""
        return _Told(self.fields_BLF[:, 1:], self.time_BL[:, 1:])


@dataclass(frozen=True)
class _Gathered:
    """Windows, and which of their events may be targets."""

    items_BL: Tensor
    context_BLF: Tensor
    seconds_BL: Tensor
    is_target_BL: Tensor
    weights_BL: Tensor | None
    all_are_targets: bool

    def end_at_target(self, is_chosen_B1: Tensor) -> "_Gathered":
        """Chosen windows without the events after their last target, left-padded again; those that
        have no target stay as they are.
        """
        if self.all_are_targets:
            return self
        back_B1 = self.is_target_BL.flip(1).int().argmax(1, keepdim=True) * is_chosen_B1
        B, L, num_fields = self.context_BLF.shape
        places_BL = torch.arange(L, device=back_B1.device) - back_B1
        is_token_BL, from_BL = places_BL >= 0, places_BL.clamp(min=0)
        from_BLF = from_BL[..., None].expand(B, L, num_fields)
        return _Gathered(
            self.items_BL.gather(1, from_BL).masked_fill_(~is_token_BL, PAD),
            self.context_BLF.gather(1, from_BLF).masked_fill_(~is_token_BL[..., None], 0),
            self.seconds_BL.gather(1, from_BL).masked_fill_(~is_token_BL, 0),
            self.is_target_BL.gather(1, from_BL) & is_token_BL,
            None if self.weights_BL is None else self.weights_BL.gather(1, from_BL),
            all_are_targets=False,
        )


@dataclass(frozen=True)
class BatchMaker:
    """Chooses the scored positions of gathered windows, and hides from them what a request does not
    know.

    Args:
        known_at_request_F: which context fields a scored position may carry, bool.
        num_rows: of the item table.
        targets: only such events are predicted, and all are read; None: every event.
        new_since: only events at or after this second are predicted, counted as the windows'
            seconds are; 0: every event. A window may score nothing then, as with `targets`.
    """

    objective: ObjectiveConfig
    known_at_request_F: Tensor
    num_rows: int
    targets: TargetWeights | None = None
    new_since: int = 0

    def make(
        self, items_BL: Tensor, context_BLF: Tensor, seconds_BL: Tensor, draws: Draws
    ) -> Batch:
        """The batch of these windows, see `Windows.gather`."""
        objective = self.objective
        draws_BL = draws.uniform(Purpose.REQUEST, items_BL.shape[1])
        is_told_BL = draws_BL >= objective.context_dropout
        told = _Told(self.known_at_request_F & is_told_BL[..., None], is_told_BL)
        windows = self._mark(items_BL, context_BLF, seconds_BL)
        if objective.kind == "masked-item":
            return _masked_item(objective, windows, told, draws, self.num_rows)
        if objective.kind == "recency-sampling":
            return _recency_sampling(objective, windows, told.of_followers(), draws)
        return _next_item(windows, told.of_followers())

    def _mark(self, items_BL: Tensor, context_BLF: Tensor, seconds_BL: Tensor) -> _Gathered:
        is_target_BL, weights_BL = items_BL != PAD, None
        if self.targets is not None:
            of_type_BL = self.targets.weigh(context_BLF)
            is_target_BL = is_target_BL & (of_type_BL > 0)
            weights_BL = of_type_BL if self.targets.is_weighted else None
        if self.new_since:
            is_target_BL = is_target_BL & (seconds_BL >= self.new_since)
        are_all = self.targets is None and not self.new_since
        return _Gathered(items_BL, context_BLF, seconds_BL, is_target_BL, weights_BL, are_all)


def _masked_item(
    objective: ObjectiveConfig, windows: _Gathered, told: _Told, draws: Draws, num_rows: int
) -> Batch:
    draws_BL = draws.uniform(Purpose.MASK, windows.items_BL.shape[1])
    is_masked_BL = (draws_BL < objective.mask_prob) & windows.is_target_BL
    # Windows that drew no position score their last target, and so do those that imitate a
    # recommendation; nothing may stand after it, as nothing does when recommending.
    last_only_B1 = draws.uniform(Purpose.LAST, 1) < objective.last_prob
    last_only_B1 |= ~is_masked_BL.any(1, keepdim=True)
    windows = windows.end_at_target(last_only_B1)
    is_last_BL = windows.is_target_BL.clone()
    is_last_BL[:, :-1] = False
    is_masked_BL = torch.where(last_only_B1, is_last_BL, is_masked_BL)

    scored_M = is_masked_BL.flatten().nonzero().squeeze(1)
    return Batch(
        items_BL=_corrupt(
            objective, windows.items_BL, is_masked_BL & ~last_only_B1, draws, num_rows
        ).masked_fill(is_masked_BL & last_only_B1, MASK),
        context_BLF=windows.context_BLF.masked_fill(is_masked_BL[..., None] & ~told.fields_BLF, 0),
        request_BLF=torch.zeros_like(windows.context_BLF),
        seconds_BL2=_pair(windows.seconds_BL.masked_fill(is_masked_BL & ~told.time_BL, 0)),
        scored_M=scored_M,
        targets_M=windows.items_BL.flatten()[scored_M],
        weights_M=_take(windows.weights_BL, scored_M),
    )


def _corrupt(
    objective: ObjectiveConfig,
    items_BL: Tensor,
    is_hidden_BL: Tensor,
    draws: Draws,
    num_rows: int,
) -> Tensor:
    """Items with the mask, any item of the catalogue, or still their own where hidden."""
    others, kept = objective.random_share, objective.kept_share
    if others == kept == 0:
        return items_BL.masked_fill(is_hidden_BL, MASK)
    L = items_BL.shape[1]
    draws_BL = draws.uniform(Purpose.SHOWN, L)
    any_BL = NUM_SPECIAL + draws.integers(Purpose.OTHER_ITEM, num_rows - NUM_SPECIAL, L)
    shown_BL = torch.where(draws_BL < others, any_BL, MASK)
    is_shown_BL = ~is_hidden_BL | (draws_BL >= 1 - kept)
    return torch.where(is_shown_BL, items_BL, shown_BL)


def _next_item(windows: _Gathered, told: _Told) -> Batch:
    inputs_BL, targets_BL = windows.items_BL[:, :-1], windows.items_BL[:, 1:]
    is_scored_BL = (inputs_BL != PAD) & windows.is_target_BL[:, 1:]
    scored_M = is_scored_BL.flatten().nonzero().squeeze(1)
    asked_BL = windows.seconds_BL[:, 1:].masked_fill(~told.time_BL, 0)
    return Batch(
        items_BL=inputs_BL,
        context_BLF=windows.context_BLF[:, :-1],
        request_BLF=windows.context_BLF[:, 1:].masked_fill(~told.fields_BLF, 0),
        seconds_BL2=_pair(windows.seconds_BL[:, :-1], asked_BL),
        scored_M=scored_M,
        targets_M=targets_BL.flatten()[scored_M],
        weights_M=_take(
            None if windows.weights_BL is None else windows.weights_BL[:, 1:], scored_M
        ),
    )


def _recency_sampling(
    objective: ObjectiveConfig, windows: _Gathered, told: _Told, draws: Draws
) -> Batch:
    is_drawn_BL = _draw_recent(objective, windows.is_target_BL, draws)
    is_kept_BL = (windows.items_BL != PAD) & ~is_drawn_BL
    # What is kept moves to the right, in its order; the gap of an event stays that of the log, also
    # where the event before it was taken out. One event at least was, so the first place is free
    # (in a window without a target it is lost, and nothing is scored).
    order_BL = is_kept_BL.int().argsort(dim=1, stable=True)[:, 1:]
    order_BLF = order_BL[..., None].expand(-1, -1, windows.context_BLF.shape[-1])
    kept_BLF = windows.context_BLF.masked_fill(~is_kept_BL[..., None], 0).gather(1, order_BLF)
    kept_BL = windows.seconds_BL.masked_fill(~is_kept_BL, 0).gather(1, order_BL)

    # The last position is one request for all targets of its window, so it tells of a field only
    # what they have in common, and nothing where they differ: what a request tells is true of its
    # target in training as in serving. With one target, as in short windows, it tells everything.
    common_B1F = _find_common(windows.context_BLF, is_drawn_BL)
    request_BLF = torch.cat([kept_BLF[:, 1:], common_B1F], dim=1).masked_fill(~told.fields_BLF, 0)
    common_B1 = _find_common(windows.seconds_BL[..., None], is_drawn_BL)[..., 0]
    asked_BL = torch.cat([kept_BL[:, 1:], common_B1], dim=1).masked_fill(~told.time_BL, 0)

    drawn_M = is_drawn_BL.flatten().nonzero().squeeze(1)
    L = is_drawn_BL.shape[1]
    return Batch(
        items_BL=windows.items_BL.masked_fill(~is_kept_BL, PAD).gather(1, order_BL),
        context_BLF=kept_BLF,
        request_BLF=request_BLF,
        seconds_BL2=_pair(kept_BL, asked_BL),
        scored_M=(drawn_M // L + 1) * (L - 1) - 1,
        targets_M=windows.items_BL.flatten()[drawn_M],
        weights_M=_take(windows.weights_BL, drawn_M),
    )


def _draw_recent(objective: ObjectiveConfig, is_target_BL: Tensor, draws: Draws) -> Tensor:
    """Targets of recency sampling, bool `[B, L]`: `target_share` of a window's targets are drawn
    with replacement, as in the authors' code, so that long windows keep most of their recent past.

    The probability falls by `recency` from a target to the one before it.
    """
    (B, L), device = is_target_BL.shape, is_target_BL.device
    counts_BL = is_target_BL.cumsum(1)
    num_B1 = counts_BL[:, -1:]
    sums_BL = (objective.recency ** (num_B1 - counts_BL).float() * is_target_BL).cumsum(1)

    max_draws = max(1, int(objective.target_share * L))
    points_BK = draws.uniform(Purpose.RECENT, max_draws) * sums_BL[:, -1:]
    places_BK = torch.searchsorted(sums_BL, points_BK, right=True)
    num_draws_B1 = (objective.target_share * num_B1.double()).floor().clamp(min=1)
    # The last columns count: of a row that is padded further they are the same.
    is_void_BK = torch.arange(max_draws - 1, -1, -1, device=device) >= num_draws_B1
    # Place L is nobody's: draws beyond a window's own number, and those of one without a target.
    places_BK = places_BK.masked_fill(is_void_BK, L)
    is_drawn_BL = torch.zeros(B, L + 1, dtype=torch.bool, device=device)
    return is_drawn_BL.scatter_(1, places_BK, True)[:, :L]


def _find_common(codes_BLF: Tensor, is_chosen_BL: Tensor) -> Tensor:
    """The code that all chosen positions share, `[B, 1, F]`; 0 where they differ or there is
    none.
    """
    is_other_BL1 = ~is_chosen_BL[..., None]
    highest_B1F = codes_BLF.masked_fill(is_other_BL1, -1).amax(1, keepdim=True)
    lowest_B1F = codes_BLF.masked_fill(is_other_BL1, torch.iinfo(codes_BLF.dtype).max)
    lowest_B1F = lowest_B1F.amin(1, keepdim=True)
    return highest_B1F.masked_fill(highest_B1F != lowest_B1F, 0)


def _take(weights_BL: Tensor | None, places_M: Tensor) -> Tensor | None:
    return None if weights_BL is None else weights_BL.flatten()[places_M]


def _pair(happened_BL: Tensor, asked_BL: Tensor | None = None) -> Tensor:
    """Times of the events beside those of the requests that follow, which a causal model alone
    reads.
    """
    asked_BL = torch.zeros_like(happened_BL) if asked_BL is None else asked_BL
    return torch.stack([happened_BL, asked_BL], dim=2)

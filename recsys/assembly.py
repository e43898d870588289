"""From the windows of a token store to the pieces that a training step computes."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recsys.batches import Batch, BatchMaker, TargetWeights
from recsys.context import NO_TIME, count_seconds
from recsys.errors import TrainingError
from recsys.interactions import training_positions
from recsys.negatives import BatchTargets, Negatives, NegativeSampler
from recsys.randomness import Draws
from recsys.ranks import gather_lists, gather_rows, rank_and_world_size
from recsys.recipe import Recipe
from recsys.seen_items import SeenItems
from recsys.splits import Split
from recsys.targets import TargetEvents
from recsys.tokens import TokenStore
from recsys.windows import Places, Windows


@dataclass(frozen=True)
class Piece:
    """A part of a global batch that is computed at once."""

    batch: Batch
    draws: Draws
    negatives: Negatives | None
    """None for a loss that looks at the whole catalogue."""
    seen: SeenItems | None
    """None for a loss that leaves out nothing of what was seen."""
    share: float
    """Of the weight of the global batch."""

    @property
    def items(self) -> list[Tensor]:
        """Every item whose row is looked at, in one dimension each."""
        negatives = [] if self.negatives is None else [self.negatives.items_GN.flatten()]
        return [self.batch.items_BL.flatten(), self.batch.targets_M, *negatives]


class Assembler:
    """Assembles this rank's part of each global batch; see `Trainer` for the arguments."""

    def __init__(
        self,
        recipe: Recipe,
        store: TokenStore,
        split: Split,
        known_at_request_F: np.ndarray,
        *,
        num_rows: int,
        seed: int,
        micro_batches: int,
        device: torch.device,
        targets: TargetEvents | None,
        new_since_s: int | None,
    ) -> None:
        self._seed, self._micro_batches, self._device = seed, micro_batches, device
        self._rank, self._world_size = rank_and_world_size()
        self._is_causal = recipe.model.attention == "causal"
        self._excludes_seen = recipe.loss.exclude_seen
        # Of a causal window one event at least is a target and no input, so it is one event longer.
        window = recipe.model.max_len + self._is_causal
        new_since = _count_from_first(store.timestamps_T, new_since_s)
        is_target_T = _mark_targets(store, targets, new_since)
        self.windows = Windows(store, split, window, device, is_target_T)
        if len(self.windows) == 0:
            since = "" if new_since_s is None else ", or none of them is new"
            raise TrainingError(
                f"No user has two training events, the later one a target{since}; there is nothing "
                "to learn from."
            )
        self._batch_maker = BatchMaker(
            recipe.objective,
            torch.from_numpy(known_at_request_F).to(device),
            num_rows,
            targets=None if targets is None else TargetWeights.of(targets, device),
            new_since=new_since,
        )
        self.sampler = None
        if recipe.loss.kind != "full-softmax":
            counts_I = _count_targets(recipe, store, split, is_target_T, num_rows)
            self.sampler = NegativeSampler(
                recipe.loss.negatives, torch.from_numpy(counts_I).to(device)
            )

    def assemble(self, places: Places, number: int) -> list[Piece]:
        """The pieces of this rank's part of the global batch of a step. Every rank calls it."""
        parts = places.split(self._micro_batches)
        draws = [Draws(self._seed, number, part.rows_B) for part in parts]
        batches = [
            self._batch_maker.make(*self.windows.gather(part.starts_B, part.lengths_B), drawn)
            for part, drawn in zip(parts, draws, strict=True)
        ]
        counts = torch.tensor(
            [[len(batch.targets_M), float(batch.weight)] for batch in batches],
            dtype=torch.float64,
            device=self._device if self._world_size > 1 else "cpu",
        )
        lengths, weights = gather_rows(counts).T.tolist()
        total, mine = sum(weights) or 1.0, self._rank * len(parts)
        firsts = [int(first) for first in itertools.accumulate(lengths, initial=0)]
        whole = self._gather_targets(batches, firsts)
        pieces = []
        for place, (batch, drawn) in enumerate(zip(batches, draws, strict=True), start=mine):
            negatives = None
            if self.sampler is not None:
                of_batch = BatchTargets(batch.targets_M if whole is None else whole, firsts[place])
                negatives = self.sampler.draw(batch.targets_M, drawn, of_batch)
            share = weights[place] / total
            pieces.append(Piece(batch, drawn, negatives, self._find_seen(batch), share))
        return pieces

    def _find_seen(self, batch: Batch) -> SeenItems | None:
        if not self._excludes_seen:
            return None
        return SeenItems.of(batch.items_BL, batch.scored_M, is_causal=self._is_causal)

    def _gather_targets(self, batches: list[Batch], firsts: list[int]) -> Tensor | None:
        """The targets of the global batch, where negatives are among them."""
        if self.sampler is None or not self.sampler.reads_batch:
            return None
        ends = firsts[:: len(batches)]
        lengths = [end - start for start, end in itertools.pairwise(ends)]
        return gather_lists(torch.cat([batch.targets_M for batch in batches]), lengths)


def _count_targets(
    recipe: Recipe,
    store: TokenStore,
    split: Split,
    is_target_T: np.ndarray | None,
    num_rows: int,
) -> np.ndarray:
    """Training events of each row, int64 `[I]`; of targets alone where negatives are among them."""
    positions_T = training_positions(store, split)
    if is_target_T is not None and recipe.loss.negatives.source in ("in-batch", "mixed"):
        # What the batch brings are targets: an item is among them as often as it is one.
        positions_T = positions_T[is_target_T[positions_T]]
    return np.bincount(store.items_T[positions_T], minlength=num_rows)


def _count_from_first(timestamps_T: np.ndarray, moment_s: int | None) -> int:
    """A moment on the scale of `context.count_seconds`; 0 for none."""
    if moment_s is None:
        return 0
    times_T = timestamps_T[timestamps_T != NO_TIME]
    if len(times_T) == 0:
        return 0
    return max(1, (moment_s * 1_000_000 - int(times_T.min())) // 1_000_000 + 1)


def _mark_targets(
    store: TokenStore, targets: TargetEvents | None, new_since: int
) -> np.ndarray | None:
    """Which events are learned to be predicted, bool `[T]`; None for all."""
    if targets is None and not new_since:
        return None
    is_target_T = np.ones(store.num_tokens, bool)
    if targets is not None:
        is_target_T &= targets.mark(store.context_TF)
    if new_since:
        is_target_T &= count_seconds(store.timestamps_T) >= new_since
    return is_target_T

"""Random numbers that depend on the seed, the step, what they are for and the row they belong to,
and on nothing that was drawn before.

So a batch is masked, its negatives are drawn and its activations dropped in the same way however
many workers share it and wherever a run was interrupted: there is no generator whose state could
differ.
"""

from dataclasses import dataclass
from enum import IntEnum, auto

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a number is for; numbers of different purposes are independent."""

    REQUEST = auto()
    MASK = auto()
    LAST = auto()
    SHOWN = auto()
    OTHER_ITEM = auto()
    RECENT = auto()
    NEGATIVES = auto()
    HIDDEN_IDS = auto()
    DROPOUT = auto()


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


_OF_ROW, _OF_COLUMN = _signed(0xD1342543DE82EF95), _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def mix(words: Tensor) -> Tensor:
    """Scrambles int64 words in place, so that neighbours have nothing in common: the finaliser of
    SplitMix64 (Steele et al., 2014, doi:10.1145/2660193.2660195).
    """
    words ^= _shifted(words, 30)
    words *= _FIRST
    words ^= _shifted(words, 27)
    words *= _SECOND
    words ^= _shifted(words, 31)
    return words


def _shifted(words: Tensor, num_bits: int) -> Tensor:
    # int64 shifts repeat the sign; words have none.
    return (words >> num_bits).bitwise_and_((1 << (64 - num_bits)) - 1)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step, for B of its rows.

    Args:
        seed: of the training.
        step: since training began.
        rows_B: int64, where the rows lie in the global batch.
    """

    seed: int
    step: int
    rows_B: Tensor

    def uniform(self, purpose: Purpose, num: int) -> Tensor:
        """Numbers in [0, 1), fp32 `[B, num]`. Columns count from the right, as positions do: a row
        that is padded further has the same ones.
        """
        columns = torch.arange(num - 1, -1, -1, device=self.rows_B.device)
        return _as_uniform(self._words(purpose, self.rows_B, columns))

    def integers(self, purpose: Purpose, high: int, num: int) -> Tensor:
        """Numbers in [0, high), int64 `[B, num]`, columns as in `uniform`."""
        columns = torch.arange(num - 1, -1, -1, device=self.rows_B.device)
        return self._words(purpose, self.rows_B, columns).remainder_(high)

    def of_groups(self, purpose: Purpose, groups_G: Tensor, num: int) -> Tensor:
        """Words `[G, num]`, int64, for groups that may span rows and are numbered in the global
        batch.
        """
        return self._words(purpose, groups_G, torch.arange(num, device=groups_G.device))

    def generator(self, purpose: Purpose) -> torch.Generator:
        """A generator of the step, the same for all rows."""
        return torch.Generator(self.rows_B.device).manual_seed(self._key(purpose))

    def noise(self, length: int) -> "Noise":
        """What drops activations of positions `[B, length]`."""
        places = torch.arange(length - 1, -1, -1, device=self.rows_B.device)
        return Noise(self._words(Purpose.DROPOUT, self.rows_B, places))

    def _words(self, purpose: Purpose, rows_R: Tensor, columns_N: Tensor) -> Tensor:
        key = self._key(purpose)
        return mix((rows_R * _OF_ROW + key)[:, None] + columns_N * _OF_COLUMN)

    def _key(self, purpose: Purpose) -> int:
        return seed_of(self.seed, self.step, purpose)


def seed_of(*words: int) -> int:
    """A number in [0, 2**63) that has nothing in common with that of other words."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


class Noise:
    """Bytes for the dropout of one forward pass, eight from a word; each call gives others.

    Args:
        words: int64, a random word for each position, `[B, L]` or some of these, `[M]`.
    """

    def __init__(self, words: Tensor, num_calls: int = 0) -> None:
        self._words, self._num_calls = words, num_calls

    def at(self, rows_M: Tensor) -> "Noise":
        """What comes next for some of the positions, flat indices into `[B * L]`."""
        return Noise(self._words.flatten()[rows_M], self._num_calls)

    def bytes_like(self, x: Tensor) -> Tensor:
        """Random bytes, uint8 `[..., D]`; a position has the same whatever stands around it."""
        num_words = -(-x.shape[-1] // 8)
        first = self._num_calls * num_words
        self._num_calls += 1
        columns = torch.arange(first, first + num_words, device=x.device)
        words = mix(self._words[..., None] + columns * _OF_COLUMN)
        return words.view(torch.uint8)[..., : x.shape[-1]]


def _as_uniform(words: Tensor) -> Tensor:
    # The upper 24 bits: as many as fp32 can tell apart.
    return (words >> 40).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)


def as_uniform_double(words: Tensor) -> Tensor:
    """Words as numbers in [0, 1), fp64."""
    return (words >> 11).bitwise_and_((1 << 53) - 1).double().mul_(2.0**-53)

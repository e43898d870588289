"""Random numbers by what they are for."""

import pytest
import torch

from recsys.randomness import Draws, Purpose, mix, seed_of

_ROWS = torch.arange(1000)


def draws(seed=0, step=0, rows=_ROWS):
    return Draws(seed, step, rows)


def test_a_row_has_its_numbers_whatever_other_rows_there_are():
    whole = draws().uniform(Purpose.MASK, 50)
    part = draws(rows=_ROWS[600:]).uniform(Purpose.MASK, 50)
    assert torch.equal(whole[600:], part)


def test_a_row_that_is_padded_further_has_the_same_numbers_at_its_positions():
    wide, narrow = (draws().uniform(Purpose.MASK, num) for num in (50, 20))
    assert torch.equal(wide[:, -20:], narrow)
    dropped = [draws().noise(num).bytes_like(torch.empty(1000, num, 16)) for num in (50, 20)]
    assert torch.equal(dropped[0][:, -20:], dropped[1])


@pytest.mark.parametrize(
    "other",
    [
        draws(seed=1).uniform(Purpose.MASK, 50),
        draws(step=1).uniform(Purpose.MASK, 50),
        draws().uniform(Purpose.LAST, 50),
        draws(rows=_ROWS + 1000).uniform(Purpose.MASK, 50),
    ],
    ids=["seed", "step", "purpose", "row"],
)
def test_another_seed_step_purpose_or_row_has_independent_numbers(other):
    here = draws().uniform(Purpose.MASK, 50)
    pairs = torch.stack([here.flatten(), other.flatten()])
    # 50,000 pairs: the standard deviation of a correlation is 0.0045.
    assert torch.corrcoef(pairs)[0, 1].abs() < 0.02


def test_uniform_numbers_are_uniform_over_rows_columns_and_neighbours():
    numbers = draws().uniform(Purpose.MASK, 100)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    shares = torch.histc(numbers, 20, 0, 1) / numbers.numel()
    # A share of 1/20 of 100,000 has a standard deviation of 0.0007.
    torch.testing.assert_close(shares, torch.full((20,), 0.05), rtol=0, atol=0.003)
    for one, next_one in (
        (numbers[:-1], numbers[1:]),
        (numbers[:, :-1], numbers[:, 1:]),
    ):
        pairs = torch.stack([one.flatten(), next_one.flatten()])
        assert torch.corrcoef(pairs)[0, 1].abs() < 0.015


def test_every_byte_of_the_noise_is_uniform():
    noise = draws().noise(10)
    for _ in range(2):
        parts = noise.bytes_like(torch.empty(1000, 10, 16)).float()
        assert parts.mean(dim=(0, 1)).sub(127.5).abs().max() < 4 * 74 / 100  # four of them
    first, second = draws().noise(10), draws().noise(10)
    one = first.bytes_like(torch.empty(1000, 10, 16))
    assert torch.equal(one, second.bytes_like(torch.empty(1000, 10, 16)))
    assert not torch.equal(one, second.bytes_like(torch.empty(1000, 10, 16)))


def test_integers_reach_both_ends():
    drawn = draws().integers(Purpose.OTHER_ITEM, 7, 50)
    assert torch.bincount(drawn.flatten(), minlength=7).min() > 0.9 * 50_000 / 7
    assert drawn.max() == 6


def test_words_are_mixed_as_published():
    # The first outputs of SplitMix64 from seed 0; its state grows by the golden ratio.
    states = torch.arange(1, 4) * (0x9E3779B97F4A7C15 - 2**64)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [word % 2**64 for word in mix(states).tolist()] == expected


def test_seeds_differ_by_every_word_and_are_no_sums_of_them():
    words = [(seed, step, rank) for seed in range(5) for step in range(20) for rank in range(4)]
    seeds = [seed_of(*chosen) for chosen in words]
    assert len(set(seeds)) == len(words)
    assert seeds == [seed_of(*chosen) for chosen in words]
    assert all(0 <= seed < 2**63 for seed in seeds)

import math

import pytest
import torch

from lme_core.layers import random


def test_mix_is_splitmix64():
    # The first outputs of the published generator for seed 0.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    got = random.mix(torch.tensor(0), torch.tensor([1, 2, 3]))
    assert [value % 2**64 for value in got.tolist()] == expected


# Rows, columns, both, one element, nothing, odd widths (pairs straddle rows), more than a block.
@pytest.mark.parametrize(
    ("shape", "region"),
    [
        ((64, 48), (slice(3, 40), slice(0, 48))),
        ((64, 48), (slice(0, 64), slice(5, 6))),
        ((37, 51), (slice(1, 36), slice(0, 51))),
        ((37, 51), (slice(2, 36), slice(7, 50))),
        ((37, 51), (slice(5, 6), slice(50, 51))),
        ((37, 51), (slice(5, 5), slice(3, 9))),
        ((5, 7, 9), (slice(1, 4), slice(0, 7), slice(2, 9))),
        ((5, 7, 9), (slice(1, 4), slice(2, 5), slice(0, 9))),
        ((3, 70001), (slice(1, 3), slice(1, 70000))),
        ((200001,), (slice(99, 199998),)),
        ((40000, 3), (slice(1, 39999), slice(1, 3))),
        ((), ()),
    ],
    ids=str,
)
def test_a_region_has_the_bits_of_the_whole(shape, region):
    key = random.key_of(42, "blocks.0.mlp.down.weight")
    whole = random.normal(key, shape, std=0.02)
    part = random.normal(key, shape, region, std=0.02)
    assert whole.shape == shape
    assert torch.equal(part, whole[region])


def test_bits_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    alone, together = [], []
    for threads, draws in ((1, alone), (3, together)):
        torch.set_num_threads(threads)
        draws.append(random.normal(7, (301, 1003)))
    torch.set_num_threads(before)
    assert torch.equal(alone[0], together[0])


def test_numbers_are_normal_and_independent():
    n = 1_000_000
    x = random.normal(random.key_of(1, "a"), (n,)).double()
    # Five standard errors of each statistic.
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for lag in (1, 2, 1024):
        assert abs((x[lag:] * x[:-lag]).mean()) < 5 / math.sqrt(n)
    # Of a million, the largest lies between 4 and 6.
    assert 4 < x.abs().max() < 6
    ranks = torch.special.ndtr(x).sort().values
    # Kolmogorov and Smirnov at one in a million.
    assert (ranks - (torch.arange(n) + 0.5) / n).abs().max() < 2.7 / math.sqrt(n)


def test_names_and_seeds_give_unrelated_numbers():
    n = 100_000
    draws = [
        random.normal(random.key_of(seed, name), (n,)) for seed in (0, 1) for name in ("a", "b")
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(n)


def test_std_scales_the_numbers():
    whole = random.normal(5, (1000,))
    # Rounding of the scaled radius: a few units in the last place.
    torch.testing.assert_close(random.normal(5, (1000,), std=0.3), whole * 0.3, rtol=1e-6, atol=0)


def test_uniform_is_uniform():
    x = random.uniform(torch.tensor(9), torch.arange(100_000)).double()
    assert x.min() >= 0
    assert x.max() < 1
    assert abs(x.mean() - 0.5) < 5 / math.sqrt(12 * 100_000)
    counts = torch.histc(x, 64, 0, 1)
    # Chi-square with 63 degrees of freedom: below 130 but once in a million.
    expected = 100_000 / 64
    assert ((counts - expected) ** 2 / expected).sum() < 130


def test_a_region_of_another_rank_or_with_a_step_is_refused():
    with pytest.raises(ValueError, match="2 slices"):
        random.normal(0, (4, 4), (slice(0, 2),))
    with pytest.raises(ValueError, match="step 1"):
        random.normal(0, (4, 4), (slice(0, 4, 2), slice(0, 4)))

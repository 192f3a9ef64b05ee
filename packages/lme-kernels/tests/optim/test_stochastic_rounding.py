"""Random bits and rounding by them: the published numbers, no bias, the same bits everywhere."""

import pytest
import torch

from lme_kernels.optim import AdamW
from lme_kernels.optim.philox import element_bits, philox, round_stochastically

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
MARKS = [pytest.mark.gpu] if WHERE == "cuda" else []


def words(*numbers):
    return tuple(torch.tensor([number]) for number in numbers)


@pytest.mark.parametrize(
    ("seed", "counters", "expected"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            2**64 - 1,
            (2**32 - 1,) * 4,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(seed, counters, expected):
    assert tuple(int(each) for each in philox(seed, words(*counters))) == expected


def test_rounding_has_no_bias_and_never_leaves_the_neighbours():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=generator)
    below = torch.where(
        values.bfloat16().float().abs() <= values.abs(),
        values.bfloat16().float(),
        (values.bfloat16().view(torch.int16) - 1).view(torch.bfloat16).float(),
    )
    above = (below.bfloat16().view(torch.int16) + 1).view(torch.bfloat16).float()
    draws = 20000
    bits = element_bits(64 * draws, seed=3, parameter=1, step=7, device=torch.device("cpu"))
    rounded = round_stochastically(values.repeat(draws), bits).float().reshape(draws, 64)
    assert bool(((rounded == below) | (rounded == above)).all())
    # Of a share p of 20000 draws the standard deviation is at most 0.5 / sqrt(20000) = 0.0035; of
    # 64 values none is five of them away.
    share = (rounded == above).double().mean(0)
    expected = ((values - below) / (above - below)).double()
    assert float((share - expected).abs().max()) < 5 * 0.0036


def test_what_is_not_finite_or_needs_no_rounding_stays():
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.5, 0.0, -2.0])
    rounded = round_stochastically(values, torch.full((6,), 0xFFFF))
    assert torch.equal(rounded[[0, 1, 3, 4, 5]].float(), values[[0, 1, 3, 4, 5]])
    assert bool(rounded[2].isnan())


def test_bits_differ_by_element_step_parameter_and_seed():
    def drawn(**changes):
        given = {"seed": 1, "parameter": 2, "step": 3, **changes}
        return element_bits(20000, device=torch.device("cpu"), **given)

    first = drawn()
    assert torch.equal(first, drawn())
    assert len(first.unique()) > 19990
    for changes in ({"seed": 2}, {"seed": 1 + 2**32}, {"parameter": 3}, {"step": 4}):
        assert float((drawn(**changes) == first).float().mean()) < 1e-3


def test_small_updates_count_on_average():
    # An update of 1e-5 is lost in bfloat16 near one, whose step is 0.0078.
    plain, stochastic = (torch.nn.Parameter(torch.ones(4096).bfloat16()) for _ in range(2))
    steps = 40
    for parameter, random in ((plain, False), (stochastic, True)):
        optimizer = AdamW([parameter], lr=1e-5, weight_decay=0.0, stochastic_rounding=random)
        for _ in range(steps):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert bool((plain == 1).all())
    moved = 1 - float(stochastic.detach().double().mean())
    # 4096 elements, each a sum of rare steps of 0.0039: the mean's deviation is 2.5e-5 or so.
    assert moved == pytest.approx(steps * 1e-5, abs=1e-4)


@pytest.mark.parametrize("where", [pytest.param(WHERE, marks=MARKS)])
def test_the_kernel_draws_the_bits_of_the_reference(where):
    # Elements past four blocks, so that all words and more than one counter are used, and past a
    # chunk of 65536.
    shapes = ((70001,), (5,))
    results = []
    for backend, place in (("triton", where), ("torch", "cpu")):
        generator = torch.Generator().manual_seed(0)
        tensors = [
            torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(place))
            for shape in shapes
        ]
        optimizer = AdamW(
            tensors, lr=1e-2, stochastic_rounding=True, seed=2**40 + 5, backend=backend
        )
        for _ in range(2):
            for each in tensors:
                drawn = torch.randn(each.shape, generator=generator).bfloat16()
                each.grad = drawn.to(place)
            optimizer.step()
        results.append([each.detach().cpu().float() for each in tensors])
    for ours, theirs in zip(*results, strict=True):
        # Values that differ in the last bit of float32 round alike but once in some thousands.
        assert float((ours == theirs).float().mean()) > 0.998

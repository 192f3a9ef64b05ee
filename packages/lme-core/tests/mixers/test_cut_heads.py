"""Mixers of which some heads are here: which heads serve them, and norms over all channels."""

import pytest
import torch

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.layers.normalization import Norm
from lme_core.mixers.checks import head_units
from lme_core.mixers.gated_norm import GatedNorm
from lme_core.mixers.recurrent import RecurrentMixer
from lme_kernels.policy import KernelPolicy


@pytest.mark.parametrize("before", [False, True], ids=["gate first", "norm first"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "p_norm"])
def test_a_norm_that_asks_for_averages_is_the_norm(kind, gated, before):
    settings = GPTBaseConfig(layer_norm_epsilon=1e-3, p_norm_order=3.0)
    whole, asking = (
        GatedNorm(kind, 6, norm_before_gate=before, settings=settings, kernels=KernelPolicy())
        for _ in range(2)
    )
    asked = []

    def average(x):
        asked.append(x)
        return x

    asking.average_channels = average
    x, gate = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # A row of padding may be zero: its norm has no slope there.
    x[0] = 0.0
    results = []
    for norm in (whole, asking):
        norm.double()
        with torch.no_grad():
            for number, each in enumerate(norm.parameters()):
                each.copy_(torch.linspace(-1, 2, 6) + number)
        inputs = [x.clone().requires_grad_(), *norm.parameters()]
        if gated:
            inputs.append(gate.clone().requires_grad_())
        y = norm(inputs[0], inputs[-1] if gated else None)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert asked
    for ours, expected in zip(*reversed(results), strict=True):
        # In float64 only the order of sums differs.
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "p_norm"])
def test_so_is_one_without_a_gate(kind):
    whole, asking = (
        Norm(kind, 6, eps=1e-3, p=3.0, zero_centered=True, kernels=KernelPolicy()).double()
        for _ in range(2)
    )
    asking.average_channels = lambda x: x
    x, residual = torch.randn(
        2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    for norm in (whole, asking):
        with torch.no_grad():
            for number, each in enumerate(norm.parameters()):
                each.copy_(torch.linspace(-1, 2, 6) + number)
    torch.testing.assert_close(asking(x), whole(x), rtol=1e-10, atol=1e-12)
    for ours, expected in zip(asking(x, residual, 0.5), whole(x, residual, 0.5), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 12])
def test_each_part_gets_the_heads_that_serve_its_own(heads, parts):
    serve, channels = 12, 4
    every = torch.arange(heads * channels).view(heads, channels)
    # What each head of the recurrence is served by, if no device had only some.
    expected = every.repeat_interleave(serve // heads, dim=0).chunk(parts)
    for rank in range(parts):
        mixer = RecurrentMixer(KernelPolicy())
        mixer.part = (rank, parts)
        mixer.gather_channels = lambda x: every.flatten()
        got = mixer.heads_here(every.flatten().chunk(parts)[rank], heads, serve=serve)
        here = serve // parts
        assert here % len(got) == 0
        assert torch.equal(got.repeat_interleave(here // len(got), dim=0), expected[rank])


def test_units_are_heads_of_the_recurrence_and_channels_of_fewer():
    counts = {"num_q_heads": 1, "num_v_heads": 6, "num_weight_heads": 2}
    assert head_units(counts, {"num_q_heads": 8, "num_v_heads": 3}) == {
        "num_q_heads * 8": 8,
        "num_v_heads": 6,
    }

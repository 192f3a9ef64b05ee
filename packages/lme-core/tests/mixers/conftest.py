"""Building mixers with values, and holding them against a loop over tokens."""

import pytest
import torch

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.layers.context import SequenceContext
from lme_kernels.policy import KernelPolicy

H, B, S = 12, 2, 11
# Documents that end inside rows, one of one token, one that fills a row's rest.
CU_SEQLENS = [0, 4, 11, 12, 17, 22]


def build_mixer(config, *, dtype=torch.float64, spread=0.5, hidden_size=H, **settings):
    """A mixer of random values, decay gates as they start."""
    settings = {"position_embedding_type": "nope", "layer_norm_epsilon": 1e-5} | settings
    model = GPTBaseConfig(hidden_size=hidden_size, sequence_mixer_blocks=(config,), **settings)
    mixer = config.build(model, 0, KernelPolicy())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * spread
            if name.endswith(("A_log", "dt_bias")):
                values = values - 0.5
            parameter.copy_(values)
    return mixer.to(dtype)


def random_input(rows=B, length=S, *, seed=1, dtype=torch.float64, hidden_size=H):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, length, hidden_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_is_loop(mixer, loop):
    """Compare values and gradients with a loop over one document's tokens, rows and packed.

    In float64 only rounding differs, over sums of tens of terms.
    """
    x = random_input().requires_grad_()
    inputs = [x, *mixer.parameters()]
    grad = random_input(seed=2)
    bounds = torch.tensor(CU_SEQLENS, dtype=torch.int32)
    for context, pieces in (
        (SequenceContext(), list(x)),
        (SequenceContext(cu_seqlens=bounds), x.flatten(0, 1).split(bounds.diff().tolist())),
    ):
        ours = mixer(x, context, None)
        expected = torch.cat([loop(piece) for piece in pieces]).view(B, S, H)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
        got = torch.autograd.grad(ours, inputs, grad)
        wanted = torch.autograd.grad(expected, inputs, grad)
        for ours_grad, its_grad in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours_grad, its_grad, rtol=1e-9, atol=1e-10)


@pytest.fixture(name="build_mixer")
def build_mixer_fixture():
    return build_mixer


@pytest.fixture(name="random_input")
def random_input_fixture():
    return random_input


@pytest.fixture(name="assert_is_loop")
def assert_is_loop_fixture():
    return assert_is_loop


@pytest.fixture
def cu_seqlens():
    return torch.tensor(CU_SEQLENS, dtype=torch.int32)


@pytest.fixture
def lift_casts(monkeypatch):
    """A function that turns transformers' own casts to float32 into casts to another dtype."""

    def lift(dtype):
        monkeypatch.setattr(torch, "float32", dtype)
        monkeypatch.setattr(torch, "float", dtype)
        monkeypatch.setattr(torch.Tensor, "float", lambda x: x.to(dtype))

    return lift


def relative(got, expected):
    """Largest difference over the largest value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(name="relative")
def relative_fixture():
    return relative

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.config import from_dict
from lme_core.layers.rotary import (
    LinearScaling,
    RopeScalingField,
    Rotary,
    YarnScaling,
    inverse_frequencies,
)


def test_frequencies_are_powers_of_the_base():
    assert inverse_frequencies(8, 10000.0) == pytest.approx([1.0, 0.1, 0.01, 0.001])


# Golden values of the seed system.
def test_yarn_frequencies_and_magnitudes_are_the_golden_ones():
    small = YarnScaling(factor=4, original_max_position_embeddings=8)
    assert inverse_frequencies(8, 1e4, small) == pytest.approx([1, 0.025, 0.0025, 0.00025])
    assert small.magnitude == pytest.approx(1.13862944)
    large = YarnScaling(factor=16, original_max_position_embeddings=2048)
    inverse = inverse_frequencies(64, 1e4, large)
    expected = [1, 0.1, 4.230769e-3, 4.256913e-4, 6.25e-5, 8.334509e-6]
    assert [inverse[j] for j in (0, 8, 16, 20, 24, 31)] == pytest.approx(expected, rel=1e-6)
    assert large.magnitude == pytest.approx(1.27725887)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "linear", "factor": 4.0},
        LLAMA3,
        YARN,
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {**YARN, "attention_factor": 0.7},
        {**YARN, "mscale": 0.9, "mscale_all_dim": 0.6},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_scaled_frequencies_are_those_of_transformers(settings):
    theta, dim = 50000.0, 64
    hf = LlamaConfig(
        hidden_size=dim * 4,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": theta, **settings},
    )
    expected, magnitude = ROPE_INIT_FUNCTIONS[settings["rope_type"]](hf, torch.device("cpu"))
    scaling = TypeAdapter(RopeScalingField).validate_python(settings)
    # transformers takes powers in float32.
    assert inverse_frequencies(dim, theta, scaling) == pytest.approx(expected.tolist(), rel=1e-6)
    assert scaling.magnitude == pytest.approx(magnitude)


def test_spellings_of_the_kind():
    adapter = TypeAdapter(RopeScalingField)
    bare = {"factor": 2.0, "original_max_position_embeddings": 1024}
    yarn = YarnScaling(factor=2.0, original_max_position_embeddings=1024)
    assert adapter.validate_python(bare) == yarn
    assert adapter.validate_python({"type": "yarn", **bare}) == yarn
    assert adapter.validate_python({"type": "linear", "rope_type": "linear", "factor": 2}) == (
        LinearScaling(factor=2.0)
    )
    assert adapter.validate_python({"rope_type": "default"}) is None
    assert adapter.validate_python(None) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "'linear', 'yarn', 'llama3'"),
        ({"rope_type": "linear", "factor": 0.5}, "`rope_scaling.factor`"),
        ({"rope_type": "linear", "factor": 2.0, "beta": 1}, "Unexpected keyword"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "low_freq_factor"),
        ({**YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ("yarn", "tag"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_scaling_is_refused_with_its_reason(settings, message):
    with pytest.raises(ValidationError, match=message):
        from_dict({"rope_scaling": settings})


def test_the_table_and_given_positions_have_the_same_bits():
    scaling = YarnScaling(factor=4, original_max_position_embeddings=8)
    rotary = Rotary(16, 10000.0, scaling)
    device = torch.device("cpu")
    cos, sin = rotary.table(50, device=device, dtype=torch.float32)
    positions = torch.tensor([[3, 0, 49], [1, 1, 2]])
    at = rotary.at(positions, dtype=torch.float32)
    assert torch.equal(at[0], cos[positions])
    assert torch.equal(at[1], sin[positions])
    angle = 3 * rotary.frequencies[2]
    assert cos[3, 2].item() == pytest.approx(math.cos(angle) * scaling.magnitude, rel=1e-6)
    assert sin[3, 2 + 8].item() == pytest.approx(math.sin(angle) * scaling.magnitude, rel=1e-6)


def test_the_table_grows_and_outlives_inference_mode():
    rotary = Rotary(4, 10000.0)
    device = torch.device("cpu")
    with torch.inference_mode():
        short, _ = rotary.table(3, device=device, dtype=torch.float32)
    long, _ = rotary.table(9, device=device, dtype=torch.float32)
    again, _ = rotary.table(3, device=device, dtype=torch.float32)
    assert torch.equal(long[:3], short)
    assert not again.is_inference()
    x = torch.ones(3, 4, requires_grad=True)
    (x * again).sum().backward()


def test_a_trace_leaves_nothing_behind():
    rotary = Rotary(4, 10000.0)
    device = torch.device("cpu")
    with FakeTensorMode():
        rotary.table(3, device=device, dtype=torch.float32)
        rotary.at(torch.arange(3), dtype=torch.float32)
    cos, _ = rotary.table(3, device=device, dtype=torch.float32)
    assert cos[0].tolist() == [1.0] * 4


def test_the_default_rotary_dim_is_the_head_size():
    assert GPTBaseConfig(hidden_size=768).rotary_dim() == 64
    assert GPTBaseConfig(hidden_size=768, rope_dim=32).rotary_dim() == 32
    assert GPTBaseConfig(hidden_size=768, position_embedding_type="nope").rotary_dim() is None

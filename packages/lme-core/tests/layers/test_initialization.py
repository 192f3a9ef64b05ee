from dataclasses import replace

import pytest
import torch
from torch import nn

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.layers.initialization import Constant, collect_specs, linear_std
from lme_core.layers.linear import Linear
from lme_kernels.policy import KernelPolicy


# Golden values of the seed system.
@pytest.mark.parametrize(
    ("settings", "fan_in", "output", "expected"),
    [
        ({"initializer_range": 0.02, "num_layers": 12}, 768, True, 0.0040824829),
        ({"initializer_range": 0.02, "num_layers": 12}, 768, False, 0.02),
        ({"initializer_range": 0.1, "init_method": "mup", "m_width": 9.0}, 768, False, 0.0333333),
        ({"init_method": "fan_in", "num_layers": 24}, 1024, True, 0.0045105490),
        ({"init_method": "fan_in", "use_depth_scaled_init": False}, 1024, True, 0.03125),
    ],
    ids=str,
)
def test_standard_deviations_are_the_golden_ones(settings, fan_in, output, expected):
    got = linear_std(GPTBaseConfig(**settings), fan_in, output=output)
    assert got == pytest.approx(expected, rel=1e-5)


def test_the_model_starts_with_those_standard_deviations():
    config = GPTBaseConfig(
        vocab_size=1024,
        hidden_size=384,
        num_layers=3,
        embedding_init_method="fan_in",
        position_embedding_type="learned_absolute",
        normalization_function="layernorm",
        initializer_range=0.1,
    )
    model = config.build(KernelPolicy())
    expected = {
        "embedding.weight": 384**-0.5,
        "position_embedding.weight": 0.1,
        "lm_head.weight": 0.1,
        "blocks.2.sequence_mixer.qkv.weight": 0.1,
        "blocks.2.sequence_mixer.output.weight": 0.1 / 6**0.5,
        "blocks.1.mlp.up.weight": 0.1,
        "blocks.1.mlp.down.weight": 0.1 / 6**0.5,
    }
    parameters = dict(model.named_parameters())
    for name, std in expected.items():
        # More than 100,000 elements: five standard errors are below 2 %.
        assert parameters[name].std().item() == pytest.approx(std, rel=0.02)
    for name in ("blocks.0.mixer_norm", "blocks.1.mlp_norm", "final_norm"):
        assert torch.equal(parameters[f"{name}.weight"], torch.ones(384))
        assert torch.equal(parameters[f"{name}.bias"], torch.zeros(384))


def test_building_consumes_no_generator_state():
    before = torch.get_rng_state()
    GPTBaseConfig(vocab_size=16, hidden_size=24, num_layers=1).build(KernelPolicy())
    assert torch.equal(torch.get_rng_state(), before)


def test_meta_then_materialise_equals_building_with_memory():
    config = GPTBaseConfig(vocab_size=64, hidden_size=48, num_layers=2)
    here = config.build(KernelPolicy(), seed=7)
    with torch.device("meta"):
        later = config.build(KernelPolicy(), seed=7)
    assert all(p.is_meta for p in later.parameters())
    later.materialize("cpu")
    for (name, p), q in zip(here.named_parameters(), later.parameters(), strict=True):
        assert torch.equal(p, q), name
    other = config.build(KernelPolicy(), seed=8)
    assert not torch.equal(other.embedding.weight, here.embedding.weight)


def test_every_region_of_a_parameter_has_the_bits_of_the_whole():
    config = GPTBaseConfig(vocab_size=64, hidden_size=48, num_layers=1)
    with torch.device("meta"):
        model = config.build(KernelPolicy())
    for name, parameter in model.named_parameters():
        whole = model.initial_value(name)
        assert whole.shape == parameter.shape
        assert whole.dtype == torch.float32
        region = tuple(slice(size // 3, size // 2) for size in whole.shape)
        assert torch.equal(model.initial_value(name, region), whole[region])


def test_a_layer_starts_the_same_in_a_deeper_model():
    config = GPTBaseConfig(vocab_size=64, hidden_size=48, num_layers=1, use_depth_scaled_init=False)
    shallow = config.build(KernelPolicy())
    deep = replace(config, num_layers=3).build(KernelPolicy())
    deeper = dict(deep.named_parameters())
    for name, parameter in shallow.named_parameters():
        assert torch.equal(parameter, deeper[name])


def test_a_parameter_without_a_spec_is_refused():
    module = nn.Sequential(Linear(2, 2, bias=True, std=1.0, mup=False), nn.LayerNorm(2))
    with pytest.raises(ValueError, match=r"1\.bias, 1\.weight"):
        collect_specs(module)
    assert collect_specs(module[0])["bias"].initial == Constant(0.0)

"""Mixtures of experts against those of transformers, values and gradients."""

import pytest
import torch
from transformers import DeepseekV3Config, Qwen2MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.layers.context import SequenceContext
from lme_core.mlps.moe import MoEConfig
from lme_kernels.policy import KernelPolicy

H, E, WIDTH = 24, 8, 12


def qwen(normalize):
    config = Qwen2MoeConfig(
        hidden_size=H,
        num_experts=E,
        num_experts_per_tok=3,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=20,
        norm_topk_prob=normalize,
    )
    ours = MoEConfig(
        num_experts=E,
        num_experts_per_tok=3,
        intermediate_size=WIDTH,
        shared_intermediate_size=20,
        shared_expert_gating=True,
        normalized_topk=normalize,
        activation_function="swiglu",
    )
    names = {
        "router.weight": ("gate.weight",),
        "shared.gate_up.weight": ("shared_expert.gate_proj.weight", "shared_expert.up_proj.weight"),
        "shared.down.weight": ("shared_expert.down_proj.weight",),
        "shared_gate.weight": ("shared_expert_gate.weight",),
    }
    return Qwen2MoeSparseMoeBlock(config), ours, names


def deepseek(normalize):
    config = DeepseekV3Config(
        hidden_size=H,
        n_routed_experts=E,
        num_experts_per_tok=3,
        moe_intermediate_size=WIDTH,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
    )
    ours = MoEConfig(
        num_experts=E,
        num_experts_per_tok=3,
        intermediate_size=WIDTH,
        shared_intermediate_size=2 * WIDTH,
        router_score_function="sigmoid",
        normalized_topk=normalize,
        num_expert_groups=4,
        num_groups_per_tok=2,
        routed_scaling_factor=2.5,
        expert_bias_update_rate=0.001,
        activation_function="swiglu",
    )
    shared = "shared_experts."
    names = {
        "router.weight": ("gate.weight",),
        "router.selection_bias": ("gate.e_score_correction_bias",),
        "shared.gate_up.weight": (f"{shared}gate_proj.weight", f"{shared}up_proj.weight"),
        "shared.down.weight": (f"{shared}down_proj.weight",),
    }
    return DeepseekV3MoE(config), ours, names


def interleaved(gate, up):
    return torch.stack((gate, up), dim=-2).flatten(-3, -2)


def expert_weights(theirs):
    """Their gate_up holds the gates first."""
    gate, up = theirs["experts.gate_up_proj"].chunk(2, dim=1)
    return {
        "experts.gate_up.weight": interleaved(gate, up),
        "experts.down.weight": theirs["experts.down_proj"],
    }


def as_ours(theirs, names):
    moved = {
        name: theirs[parts[0]] if len(parts) == 1 else interleaved(*(theirs[p] for p in parts))
        for name, parts in names.items()
        if all(part in theirs for part in parts)
    }
    return moved | expert_weights(theirs)


# In float64 with their casts to float32 lifted; in float32 as they are.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "as scored"])
@pytest.mark.parametrize("family", [qwen, deepseek])
def test_values_and_gradients_are_those_of_transformers(
    family, normalize, dtype, tolerance, monkeypatch
):
    theirs, config, names = family(normalize)
    theirs = theirs.to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*theirs.parameters(), *theirs.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    settings = GPTBaseConfig(hidden_size=H, position_embedding_type="nope", num_layers=1)
    ours = config.build(settings, 0, KernelPolicy()).to(dtype)
    values = as_ours(dict(theirs.named_parameters()) | dict(theirs.named_buffers()), names)
    with torch.no_grad():
        for name, tensor in (*ours.named_parameters(), *ours.named_buffers()):
            tensor.copy_(values[name])
    x = torch.randn(2, 15, H, generator=generator, dtype=dtype).requires_grad_()
    with monkeypatch.context() as lifted:
        if dtype == torch.float64:
            lifted.setattr(torch, "float32", torch.float64)
            lifted.setattr(torch, "float", torch.float64)
        expected = theirs(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    got, _ = ours(x, SequenceContext())
    assert (got - expected).abs().max() / expected.abs().max() < tolerance
    grad = torch.randn(got.shape, generator=generator, dtype=dtype)
    named = dict(theirs.named_parameters())
    gradients = torch.autograd.grad(expected, [x, *named.values()], grad)
    of_x, *rest = gradients
    wanted = as_ours(dict(zip(named, rest, strict=True)), names)
    inputs = dict(ours.named_parameters())
    mine = torch.autograd.grad(got, [x, *inputs.values()], grad)
    for name, gradient in zip(["x", *inputs], mine, strict=True):
        its = of_x if name == "x" else wanted[name]
        assert (gradient - its).abs().max() / its.abs().max() < 10 * tolerance, name

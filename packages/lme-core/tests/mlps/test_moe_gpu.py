"""Mixtures of experts on a GPU: as on the CPU, without waiting, compiled."""

import pytest
import torch

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.layers.context import SequenceContext
from lme_core.mlps.moe import MoEConfig
from lme_kernels.policy import KernelPolicy

pytestmark = pytest.mark.gpu

H, E = 384, 8
KINDS = {
    "softmax": {},
    "shared, gated": {"shared_intermediate_size": 128, "shared_expert_gating": True},
    "sigmoid, groups": {
        "router_score_function": "sigmoid",
        "expert_bias_update_rate": 0.001,
        "num_expert_groups": 4,
        "num_groups_per_tok": 2,
        "routed_scaling_factor": 2.5,
    },
    "no fused activation": {"activation_function": "mish_glu"},
}


def build(**fields):
    fields = {"activation_function": "swiglu", "intermediate_size": 128} | fields
    config = MoEConfig(num_experts=E, num_experts_per_tok=2, **fields)
    moe = config.build(GPTBaseConfig(hidden_size=H, num_layers=1), 0, KernelPolicy())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*moe.parameters(), *moe.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return moe


def run(moe, x):
    """Output, losses, counts and gradients."""
    x = x.detach().requires_grad_()
    y, auxiliary = moe(x, SequenceContext())
    total = (y.float() * torch.linspace(-1, 1, y.shape[-1], device=y.device)).sum()
    total = total + sum(auxiliary.losses.values())
    named = dict(moe.named_parameters())
    gradients = torch.autograd.grad(total, [x, *named.values()])
    return y, auxiliary, dict(zip(["x", *named], gradients, strict=True))


def relative(got, expected):
    expected = expected.double()
    return ((got.cpu().double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
# Rounding to 24 and to 8 bits, twice in a row.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_the_cpu(fields, dtype, tolerance):
    moe = build(**fields).to(dtype)
    x = torch.randn(2, 300, H, generator=torch.Generator().manual_seed(1)).to(dtype)
    reference = build(**fields)
    with torch.no_grad():
        for ours, rounded in zip(reference.parameters(), moe.parameters(), strict=True):
            ours.copy_(rounded)
    expected, its, gradients = run(reference.double(), x.double())
    got, auxiliary, of_gpu = run(moe.cuda(), x.cuda())
    assert got.dtype == dtype
    # Router logits are float32 products of the same numbers: the choice may differ in ties only.
    same = auxiliary.statistics["expert_counts"].cpu() - its.statistics["expert_counts"]
    assert same.abs().sum() <= 2
    assert relative(got.detach(), expected.detach()) < tolerance
    for name, loss in its.losses.items():
        assert auxiliary.losses[name].item() == pytest.approx(loss.item(), rel=1e-4)
    for name, gradient in gradients.items():
        assert relative(of_gpu[name], gradient) < 2 * tolerance, name


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_nothing_waits_for_the_device(fields):
    moe = build(**fields).cuda().bfloat16()
    x = torch.randn(2, 300, H, device="cuda", dtype=torch.bfloat16)
    run(moe, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(moe, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_compiles_whole():
    moe = build(shared_intermediate_size=128).cuda()
    x = torch.randn(2, 300, H, device="cuda")
    expected, _, gradients = run(moe, x)
    moe.compile(fullgraph=True)
    got, _, compiled = run(moe, x)
    assert relative(got.detach(), expected.detach().cpu()) < 1e-5
    for name, gradient in gradients.items():
        assert relative(compiled[name], gradient.cpu()) < 1e-4, name

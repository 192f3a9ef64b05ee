"""Exponentials of the gated delta rule in float32, which a GPU's own are not exact enough for."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from lme_kernels.ops.gated_delta_rule import GATED_DELTA_RULE
from lme_kernels.ops.gated_delta_rule._triton_system import power_of_two
from lme_kernels.testing import device_for, fused_backends

BACKENDS = [
    pytest.param(each, marks=[pytest.mark.gpu] if device_for(each).type != "cpu" else [])
    for each in fused_backends(GATED_DELTA_RULE)
]


@triton.jit
def powers_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, power_of_two(tl.load(x_ptr + at), "ieee"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_powers_of_two_are_exact_to_a_unit_in_the_last_place(backend):
    x = torch.cat((-torch.rand(2000) * 125, torch.rand(1000) * 10, torch.arange(-125.0, 127.0)))
    ends = torch.tensor([-torch.inf, -1e30, -200.0, 0.0, 1.0, 128.0, torch.inf, torch.nan])
    x = torch.cat((x, ends, torch.zeros(-(len(x) + len(ends)) % 1024))).to(device_for(backend))
    y = torch.empty_like(x)
    powers_kernel[(len(x) // 1024,)](x, y, BLOCK=1024)
    exact = x.double().exp2()
    normal = (exact >= 2.0**-126) & (exact < 3e38)
    worst = ((y.double() - exact) / exact)[normal].abs().max()
    # Two to the power of -23.
    assert worst < 1.2e-7
    assert (y[exact < 2.0**-127] == 0.0).all()
    assert (y[exact > 3.4e38] == torch.inf).all()
    assert torch.equal(y.isnan(), x.isnan())

import pytest
import torch
from torch.nn import functional as F

from lme_kernels.functional import p_norm


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 2.5])
def test_p_norm_is_torchs_normalize(p):
    x = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, dtype=torch.float64, requires_grad=True)
    ours = p_norm(x, weight, p=p, eps=1e-6)
    theirs = F.normalize(x, p=p, dim=-1, eps=1e-6) * weight
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(x)
    pairs = zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (ours, theirs)), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def test_a_row_shorter_than_eps_is_divided_by_eps():
    x = torch.tensor([[0.03, 0.04], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    y = p_norm(x, eps=0.5)
    torch.testing.assert_close(y, x / 0.5)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(grad, torch.full_like(x, 2.0))


@pytest.mark.parametrize("p", [0.5, float("inf")])
def test_other_orders_are_refused(p):
    with pytest.raises(ValueError, match="`p` must be at least 1 and finite"):
        p_norm(torch.randn(2, 3), p=p)

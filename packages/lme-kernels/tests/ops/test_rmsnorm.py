import pytest
import torch

from lme_kernels.functional import rmsnorm
from lme_kernels.ops.rmsnorm import RMSNORM
from lme_kernels.testing import check_against_reference, dtypes_for, fused_backends

BACKENDS = [(b, d) for b in fused_backends(RMSNORM) for d in dtypes_for(b)]

# Rows that share a program; a row past a power of two, so that the mask is used; and a single
# element, whose gradient is eps / (x^2 + eps)^1.5: nothing but rounding unless eps is large.
CASES = [((3, 5, 64), 1e-5), ((2, 4097), 1e-5), ((37, 129), 1e-5), ((1, 1), 0.5)]


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
@pytest.mark.parametrize(("shape", "eps"), CASES, ids=str)
@pytest.mark.parametrize("with_weight", [True, False])
def test_values_and_gradients_match_the_reference(backend, dtype, shape, eps, with_weight):
    x = torch.randn(shape)
    weight = torch.randn(shape[-1]) if with_weight else None
    check_against_reference(rmsnorm, (x, weight), {"eps": eps}, backend=backend, dtype=dtype)

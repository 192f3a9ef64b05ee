"""What holds for every implementation of every op, proven on the example calls beside each op."""

import pytest
import torch

from lme_kernels.examples import examples_of
from lme_kernels.functional import ALL_OPS
from lme_kernels.op import UnsupportedBackendError
from lme_kernels.testing import check_against_reference, dtypes_for, fused_backends

CALLS = [
    pytest.param(op, example, backend, id=f"{op.name}@{backend}-{example.name}")
    for op in ALL_OPS.values()
    for backend in fused_backends(op)
    for example in examples_of(op)
]
FIRST_CALLS = [
    pytest.param(op, examples_of(op)[0], backend, id=f"{op.name}@{backend}")
    for op in ALL_OPS.values()
    for backend in fused_backends(op)
]


def moved(example, where):
    return [
        each.to(where) if isinstance(each, torch.Tensor) else each for each in example.arguments
    ]


@pytest.mark.parametrize(("op", "example", "backend"), CALLS)
def test_values_and_gradients_match_float64(op, example, backend):
    for dtype in dtypes_for(backend):
        try:
            check_against_reference(
                op.function,
                example.arguments,
                example.options,
                backend=backend,
                dtype=dtype,
                constants=example.constants,
            )
        except UnsupportedBackendError as error:
            pytest.skip(str(error))

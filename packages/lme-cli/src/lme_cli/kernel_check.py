"""Every kernel that can run on this machine against its reference, values and gradients."""

from collections.abc import Sequence

import torch

from lme_cli.errors import CommandError
from lme_kernels.examples import Example, examples_of
from lme_kernels.functional import ALL_OPS
from lme_kernels.op import Op
from lme_kernels.testing import check_against_reference, device_for, dtypes_for, fused_backends


def check_kernels(names: Sequence[str]) -> bool:
    """Check ops, printing one line for each implementation.

    Args:
        names: Ops; all if empty.

    Returns:
        Whether every implementation that ran was right.

    Raises:
        CommandError: If there is no such op.
    """
    unknown = [name for name in names if name not in ALL_OPS]
    if unknown:
        raise CommandError(f"there is no op `{unknown[0]}`; there are {', '.join(ALL_OPS)}")
    is_right = True
    for name in names or ALL_OPS:
        op = ALL_OPS[name]
        backends = fused_backends(op)
        if not backends:
            known = ", ".join(op.implementations) or "none"
            print(f"{name}: only the torch reference runs here (other implementations: {known})")
        for backend in backends:
            faults = _faults(op, backend)
            is_right = is_right and not faults
            where = device_for(backend)
            print(f"{name}@{backend}: {'; '.join(faults) if faults else 'right'} ({where})")
    return is_right


def _faults(op: Op, backend: str) -> list[str]:
    return [
        f"{example.name}, {str(dtype).removeprefix('torch.')}: {fault}"
        for dtype in dtypes_for(backend)
        for example in examples_of(op)
        if (fault := _fault(op, backend, dtype, example)) is not None
    ]


def _fault(op: Op, backend: str, dtype: torch.dtype, example: Example) -> str | None:
    """Say what is wrong with one call, `None` if nothing is; kernels may fail in any way."""
    try:
        check_against_reference(
            op.function,
            example.arguments,
            example.options,
            backend=backend,
            dtype=dtype,
            constants=example.constants,
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None

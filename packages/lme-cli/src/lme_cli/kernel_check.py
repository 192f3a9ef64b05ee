"""Every kernel that can run on this machine against its reference, values and gradients."""

from collections.abc import Sequence

import torch

from lme_cli.errors import CommandError
from lme_kernels.examples import Example, examples_of
from lme_kernels.functional import ALL_OPS
from lme_kernels.op import Op, UnsupportedBackendError
from lme_kernels.testing import check_against_reference, device_for, dtypes_for, fused_backends


def check_kernels(names: Sequence[str]) -> bool:
    """Check ops against their references in float64, printing a verdict for each implementation.

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
            verdict, faults = _judge(op, backend)
            is_right = is_right and not faults
            print(f"{name}@{backend}: {verdict} ({device_for(backend)})", flush=True)
            for fault in faults:
                print(f"  {fault}")
    return is_right


def _judge(op: Op, backend: str) -> tuple[str, list[str]]:
    """Run every example in every dtype; return a verdict and what is wrong, if anything is."""
    faults: list[str] = []
    refusals: list[str] = []
    calls = 0
    for dtype in dtypes_for(backend):
        for example in examples_of(op):
            try:
                fault = _fault(op, backend, dtype, example)
            except UnsupportedBackendError as error:
                # It says that it does not serve this call: the automatic choice takes another.
                refusals.append(str(error))
                continue
            calls += 1
            if fault is not None:
                faults.append(f"{example.name}, {str(dtype).removeprefix('torch.')}: {fault}")
    if faults:
        return f"WRONG in {len(faults)} of {calls} calls", faults
    if not calls:
        return f"serves none of the examples: {refusals[0]}", faults
    refused = f", {len(refusals)} it does not serve" if refusals else ""
    return f"right in {calls} calls{refused}", faults


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
    except UnsupportedBackendError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None

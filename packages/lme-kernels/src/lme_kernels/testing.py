"""What the tests of every op share: which backends run here, and when results match."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lme_kernels import device
from lme_kernels.op import Backend, Op

# Relative root mean square error that is allowed however exact the torch reference is. Rounding
# a result once costs about a quarter of the dtype's epsilon; float32 leaves room for sums in
# another order.
FLOORS: Mapping[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 5e-7,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}


def fused_backends(op: Op) -> list[str]:
    """List the implementations of `op` besides the reference that take torch tensors here.

    Args:
        op: The op.

    Returns:
        Names for `backend=`; none where no accelerator is and Triton is not interpreted, which
        makes pytest skip what it parametrises.
    """
    return [
        str(each)
        for each in op.implementations
        if any(device.why_unavailable(each, where) is None for where in device.types_here())
    ]


def device_for(backend: str) -> torch.device:
    """Return the device to test `backend` on: the accelerator if it serves it, else the CPU."""
    for where in reversed(device.types_here()):
        if device.why_unavailable(backend, where) is None:
            return torch.device(where)
    raise ValueError(f"`{backend}` runs on none of {', '.join(device.types_here())}")


def dtypes_for(backend: str) -> list[torch.dtype]:
    """List the dtypes to test `backend` in: the Triton interpreter's bfloat16 is wrong."""
    if backend == Backend.TRITON and device_for(backend).type == "cpu":
        return [torch.float32, torch.float16]
    return [torch.float32, torch.float16, torch.bfloat16]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over the root mean square of `exact`."""
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} should be {tuple(exact.shape)}")
    if actual.numel() == 0:
        return 0.0
    # Apple's GPUs have no float64.
    place = torch.device("cpu") if exact.device.type == "mps" else exact.device
    expected = exact.detach().to(place).double()
    difference = actual.detach().to(expected.device).double() - expected
    size = expected.square().mean().sqrt()
    # An exact zero has no scale of its own: the error is then absolute.
    return float(difference.square().mean().sqrt() / (size if size > 0 else 1.0))


def assert_matches(
    actual: Tensor,
    reference: Tensor,
    exact: Tensor | None = None,
    *,
    name: str = "result",
    roundings: float = 1.0,
) -> None:
    """Check that `actual` is as exact as the torch reference of the same dtype.

    Args:
        actual: What an implementation gave.
        reference: What the torch reference gave for the same arguments in the same dtype.
        exact: What the torch reference gave in float64; `None` takes `reference` for exact.
        name: What is compared, for the message.
        roundings: Factor of the error that is allowed however exact the reference is.

    Raises:
        AssertionError: If shape or dtype differ, or the relative root mean square error is more
            than twice that of `reference` and above the floor of the dtype; or integers differ.
    """
    if actual.dtype != reference.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype} should be {reference.dtype}")
    if not actual.is_floating_point():
        if not torch.equal(actual, reference):
            raise AssertionError(f"{name}: integers differ")
        return
    floor = FLOORS[actual.dtype] * roundings
    error = relative_error(actual, reference if exact is None else exact)
    allowed = floor if exact is None else max(2.0 * relative_error(reference, exact), floor)
    # Written so that a NaN fails.
    if not error <= allowed:
        raise AssertionError(f"{name}: relative error {error:.3e} is above {allowed:.3e}")


@dataclass(frozen=True, slots=True)
class Run:
    """Outputs of a call and gradients of its floating-point arguments."""

    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def run(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    options: Mapping[str, Any],
    *,
    constants: Sequence[int] = (),
    weight_dtype: torch.dtype | None = None,
) -> Run:
    """Call `function` and differentiate the sum of its outputs times fixed random weights.

    Args:
        function: Public function of an op.
        arguments: Its positional arguments; floating-point tensors get a gradient.
        options: Its keyword arguments.
        constants: Positions of floating-point arguments that have no gradient.
        weight_dtype: Dtype to round the weights to first; `None` for that of each output.

    Returns:
        Outputs and gradients, the latter in the order of the arguments.
    """
    leaves: list[Tensor] = []
    prepared: list[Any] = []
    for position, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and argument.is_floating_point():
            argument = argument.detach()
            if position not in constants:
                argument.requires_grad_()
                leaves.append(argument)
        prepared.append(argument)
    result = function(*prepared, **options)
    outputs = tuple(result) if isinstance(result, tuple) else (result,)
    weights = []
    for index, output in enumerate(outputs):
        generator = torch.Generator().manual_seed(index)
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float32)
        rounded = weight.to(weight_dtype or output.dtype)
        weights.append(rounded.to(device=output.device, dtype=output.dtype))
    # Indices and counts among the outputs have no gradient.
    pairs = [each for each in zip(outputs, weights, strict=True) if each[0].requires_grad]
    gradients = ()
    if pairs:
        differentiable, factors = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(differentiable, leaves, factors)
    return Run(outputs, tuple(gradients))


def check_against_reference(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    *,
    backend: str | None,
    dtype: torch.dtype,
    where: torch.device | str | None = None,
    constants: Sequence[int] = (),
    roundings: float = 1.0,
) -> None:
    """Prove an implementation on one call: outputs and all gradients, by the rule of this package.

    The floating-point arguments are rounded to `dtype` first, so that float64 computes the exact
    result of what the implementation was given.

    Args:
        function: Public function of an op.
        arguments: Positional arguments on any device; floating-point tensors may have any dtype
            and keep their strides.
        options: Keyword arguments.
        backend: Implementation to prove.
        dtype: Dtype to prove it in.
        where: Device to run on; `None` takes `device_for(backend)`.
        constants: Positions of floating-point arguments that have no gradient.
        roundings: As `assert_matches` takes it: for kernels of libraries, which we only choose.

    Raises:
        AssertionError: If an output or a gradient does not match.
    """
    place = torch.device(where) if where is not None else device_for(backend or Backend.TORCH)
    given = [_placed(each, dtype, place) for each in arguments]
    exact_given = [_placed(each, torch.float64, place) for each in given]
    rounded = {key: _placed(value, dtype, place) for key, value in (options or {}).items()}
    exact_options = {key: _placed(value, torch.float64, place) for key, value in rounded.items()}
    runs = (
        run(
            function, values, {**keywords, "backend": each}, constants=constants, weight_dtype=dtype
        )
        for values, keywords, each in (
            (given, rounded, backend),
            (given, rounded, Backend.TORCH),
            (exact_given, exact_options, Backend.TORCH),
        )
    )
    fused, plain, exact = runs
    for kind, ours, theirs, truth in (
        ("output", fused.outputs, plain.outputs, exact.outputs),
        ("gradient", fused.gradients, plain.gradients, exact.gradients),
    ):
        if len(ours) != len(theirs):
            raise AssertionError(f"{len(ours)} {kind}s should be {len(theirs)}")
        for index, (actual, reference, true) in enumerate(zip(ours, theirs, truth, strict=True)):
            assert_matches(actual, reference, true, name=f"{kind} {index}", roundings=roundings)


def _placed(argument: Any, dtype: torch.dtype, place: torch.device) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    if not argument.is_floating_point():
        return argument.to(place)
    # Keeps strides, unlike `Tensor.to` of a strided view.
    placed = torch.empty_strided(argument.shape, argument.stride(), dtype=dtype, device=place)
    return placed.copy_(argument.detach())

"""Which accelerator is here, and what each backend needs of it."""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from lme_kernels.cuda_driver import why_unusable

# Device types of torch tensors that a backend runs on; one that is not here decides for itself.
SERVED_DEVICES: dict[str, frozenset[str]] = {
    "triton": frozenset({"cuda", "xpu"}),
    "cuda": frozenset({"cuda"}),
    "pallas": frozenset({"xla"}),
    "nki": frozenset({"xla"}),
    "flash_varlen": frozenset({"cuda"}),
    "flex": frozenset({"cuda"}),
    "cudnn": frozenset({"cuda"}),
    "flash": frozenset({"cuda"}),
    "efficient": frozenset({"cuda"}),
    "flash_attention_2": frozenset({"cuda"}),
    "flash_attention_3": frozenset({"cuda"}),
    "flash_attention_4": frozenset({"cuda"}),
}

NEEDED_PACKAGES: dict[str, tuple[str, ...]] = {
    "triton": ("triton",),
    "pallas": ("jax", "torch_xla"),
    "nki": ("neuronxcc", "torch_xla"),
    "flash_attention_3": ("flash_attn_interface",),
    "flash_attention_4": ("flash_attn",),
}

TRITON_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


def types_here() -> tuple[str, ...]:
    """Types of the devices whose tensors can exist here: the CPU and its accelerator, if any."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def is_triton_interpreted() -> bool:
    """Whether Triton kernels run as Python on the CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y")


def why_unavailable(backend: str, device_type: str) -> str | None:
    """Say why `backend` cannot run on tensors of `device_type`.

    Args:
        backend: One of `lme_kernels.op.Backend`.
        device_type: `torch.device.type`: "cpu", "cuda", "xpu", ...

    Returns:
        The reason in words, or `None` if the backend can run there.
    """
    if backend == "torch":
        return None
    for package in NEEDED_PACKAGES.get(backend, ()):
        if find_spec(package) is None:
            return f"the package `{package}` is not installed"
    if backend == "triton" and device_type == "cpu":
        if is_triton_interpreted():
            return _why_no_interpreter()
        return "Triton runs on CPU tensors only under its interpreter (`TRITON_INTERPRET=1`)"
    served = SERVED_DEVICES.get(backend)
    if served is None:
        return None
    if device_type not in served:
        return f"it runs on {', '.join(sorted(served))} tensors, and these are on {device_type}"
    return why_unusable() if backend == "cuda" else None


@cache
def _why_no_interpreter() -> str | None:
    """Say why the interpreter of the Triton here cannot run; `None` if it can."""
    triton, numpy = (
        tuple(int(part) for part in import_module(each).__version__.split(".")[:2])
        for each in ("triton", "numpy")
    )
    # It turns arrays of one element into numbers, which NumPy no longer does.
    if triton < (3, 6) and numpy >= (2, 4):
        return "the interpreter of Triton before 3.6 does not run with NumPy 2.4 or newer"
    return None


def why_not_triton(*tensors: Tensor | None) -> str | None:
    """Say why the Triton kernels of this package cannot take `tensors`.

    The kernels accumulate in float32, so float64 (used to prove gradients) is left to the
    reference, which accumulates in float64.

    Args:
        tensors: The floating-point arguments of a call; `None` stands for one left out.

    Returns:
        The reason in words, or `None` if they can.
    """
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in TRITON_DTYPES:
            return f"{tensor.dtype} is not among float32, float16 and bfloat16"
    return None


def why_not_shared(x: Tensor, needed: int) -> str | None:
    """Say why programs that take so much shared memory cannot run where a tensor is.

    Args:
        x: An input of theirs.
        needed: Bytes a program.

    Returns:
        The reason in words, or `None` if they fit, or are interpreted.
    """
    if not x.is_cuda:
        return None
    device = torch.cuda.get_device_properties(x.device)
    # AMD's devices have one limit.
    most = getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block)
    if most >= needed:
        return None
    return (
        f"its programs take {needed // 1024} KiB of shared memory, and {device.name} has "
        f"{most // 1024}"
    )

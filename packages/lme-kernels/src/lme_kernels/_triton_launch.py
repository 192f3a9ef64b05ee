"""Launching Triton's kernels with little Python.

At every call Triton binds arguments, works out how each specialises the kernel and builds a key of
it: some 20 microseconds, and twice that in the thread that runs a backward, whose processor is
cold. Here the key is made of what the specialisation depends on and nothing else.
"""

from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

# Options of a launch that are no arguments of the kernel.
OPTIONS = frozenset({"num_warps", "num_stages", "num_ctas", "maxnreg"})


class ThinLaunch:
    """A kernel that is launched as `kernel[grid](*arguments, **constants_and_options)`."""

    def __init__(self, kernel: Any) -> None:
        """Keep what `triton.jit` made, whose constants follow all its other arguments."""
        self.kernel = kernel
        self.__name__ = kernel.__name__
        self._compiled: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> "Launch":
        """Say how many programs run; at most three numbers."""
        return Launch(self, grid)

    # What a kernel takes differs from kernel to kernel.
    def launch(self, grid: tuple[int, ...], args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        """Launch on the current stream of the current device.

        Args:
            grid: Programs.
            args: What is no constant, in order.
            settings: Constants and options by name, always in the same order.
        """
        # A compiler may run without a device.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
        key = (device, *settings.values(), *map(_kind, args))
        found = self._compiled.get(key)
        if found is None:
            compiled = self.kernel[grid](*args, **settings)
            constants = self._constants(len(args), settings)
            if constants is not None and isinstance(compiled, CompiledKernel):
                self._compiled[key] = (compiled, constants)
            return
        compiled, constants = found
        # Triton wants all three numbers here.
        whole = (*grid, 1, 1)[:3]
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled[whole](*args, *constants, stream=stream)

    def _constants(self, num_args: int, settings: dict[str, Any]) -> tuple[object, ...] | None:
        names = self.kernel.arg_names[num_args:]
        if set(settings) - OPTIONS != set(names):
            return None
        return tuple(settings[name] for name in names)


class Launch:
    """A kernel and its grid."""

    __slots__ = ("_grid", "_kernel")

    def __init__(self, kernel: ThinLaunch, grid: tuple[int, ...]) -> None:
        """Keep both."""
        self._kernel = kernel
        self._grid = grid

    def __call__(self, *args: Any, **settings: Any) -> None:
        """Launch."""
        self._kernel.launch(self._grid, args, settings)


def thin_launch(kernel: Any) -> Any:
    """Make the launches of a kernel cheap; the interpreter's kernels stay as they are.

    Args:
        kernel: What `triton.jit` made. Other kernels cannot call the result.
    """
    return ThinLaunch(kernel) if isinstance(kernel, JITFunction) else kernel


def _kind(value: Any) -> object:
    """What of an argument a compiled kernel depends on."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.dtype if value.data_ptr() & 15 == 0 else (value.dtype,)
    if type(value) is int:
        # One and multiples of 16 are compiled in, and so is the width.
        wide = not -0x80000000 <= value <= 0x7FFFFFFF
        # Not `1`, which is equal to `True`.
        return (wide, "one" if value == 1 else value & 15 == 0)
    return type(value)

"""Compile every Triton kernel that the example calls launch, for a GPU that is not here.

Run as a script by `test_triton_compiles.py`, since Triton's interpreter, under which the other
tests run, cannot be left within a process. Prints one line for each op, of the kernels it
compiled; arguments: the architectures, such as `cuda:90`.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lme_kernels.examples import examples_of
from lme_kernels.functional import ALL_OPS
from lme_kernels.op import Op
from lme_kernels.testing import run


class AbsentDevice:
    """Answers what the compiler asks a driver, for a device that is not here."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def target_of(architecture):
    backend, _, number = architecture.partition(":")
    return GPUTarget(
        backend, int(number) if number.isdigit() else number, 64 if backend == "hip" else 32
    )


def compile_op(op, dtype):
    """Run the examples with launches replaced by compilations; return the kernels' names."""
    names, seen = set(), set()
    run_kernel = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        # Sizes of blocks do not change which code is compiled; flags and names do.
        flags = tuple(sorted((k, v) for k, v in kwargs.items() if isinstance(v, bool | str)))
        if (self, flags) not in seen:
            seen.add((self, flags))
            names.add(self.fn.__name__)
            run_kernel(self, *args, grid=grid, warmup=True, **kwargs)

    fused = Op(
        name=op.name,
        reference=vars(__import__(op.implementations["triton"], fromlist=["_"]))[op.name],
    )
    module = sys.modules[op.function.__module__]
    constant = next(name for name, value in vars(module).items() if value is op)
    JITFunction.run = compile_only
    setattr(module, constant, fused)
    try:
        for example in examples_of(op):
            arguments = [
                each.to(dtype)
                if isinstance(each, torch.Tensor) and each.is_floating_point()
                else each
                for each in example.arguments
            ]
            run(op.function, arguments, example.options, constants=example.constants)
    finally:
        JITFunction.run = run_kernel
        setattr(module, constant, op)
    return names


def main(architectures):
    for architecture in architectures:
        triton.runtime.driver.set_active(AbsentDevice(target_of(architecture)))
        for op in ALL_OPS.values():
            if "triton" in op.implementations:
                names = compile_op(op, torch.bfloat16)
                print(architecture, op.name, *sorted(names), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Compile every Triton kernel for a GPU that is not here.

Run as a script by `test_triton_compiles.py`, since Triton's interpreter, under which the other
tests run, cannot be left within a process. Argument: the architecture, such as `cuda:90`.

The launches of all example calls are listed first. Those that are compiled have together each value
of each flag and each mix of dtypes of a kernel; more of them differ in nothing that the interpreter
does not see. What models launch is compiled as it is. Prints `op NAME KERNELS...` for the kernels
that the examples of an op launch, and `kernel NAME LARGEST SHARED SPILLED RACES` for each that is
compiled: the largest constant, bytes of shared memory, bytes of registers that are spilled (-1 where
that is not looked for), and the number of tiles in shared memory that are overwritten too early.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from model_launches import launch_all
from shared_memory_races import races
from triton import knobs
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


@dataclass
class Launch:
    """A launch that was asked for."""

    kernel: JITFunction
    args: tuple
    grid: object
    settings: dict

    @property
    def name(self):
        return self.kernel.fn.__name__

    def traits(self):
        """Each flag or name with its value, and each argument with its dtype."""
        found = {(k, v) for k, v in self.settings.items() if isinstance(v, bool | str)}
        tensors = ((k, v) for k, v in enumerate(self.args) if isinstance(v, torch.Tensor))
        return found | {(place, each.dtype) for place, each in tensors}

    def compile(self):
        return self.kernel.run(*self.args, grid=self.grid, warmup=True, **self.settings)


def target_of(architecture):
    backend, _, number = architecture.partition(":")
    return GPUTarget(
        backend, int(number) if number.isdigit() else number, 64 if backend == "hip" else 32
    )


def listed(call):
    """Make a call with every launch put on a list instead."""
    launches = []
    run_kernel = JITFunction.run

    def note(self, *args, grid, warmup, **settings):
        launches.append(Launch(self, args, grid, settings))

    JITFunction.run = note
    try:
        call()
    finally:
        JITFunction.run = run_kernel
    return launches


def run_examples(op, dtype):
    """Run the examples of an op by its Triton kernels, which the choice would not take here."""
    fused = Op(
        name=op.name,
        reference=vars(__import__(op.implementations["triton"], fromlist=["_"]))[op.name],
    )
    module = sys.modules[op.function.__module__]
    constant = next(name for name, value in vars(module).items() if value is op)
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
        setattr(module, constant, op)


def chosen(launches, covered):
    """Pick few launches that have every trait of those of their kernel, beside what is covered."""
    of_kernel = {}
    for each in launches:
        of_kernel.setdefault(each.kernel, []).append(each)
    found = []
    for kernel, group in of_kernel.items():
        left = set().union(*(each.traits() for each in group)) - covered.get(kernel, set())
        if kernel not in covered:
            left.add(None)
        while left:
            best = max(group, key=lambda each: len(each.traits() & left))
            found.append(best)
            left -= best.traits() | {None}
    return found


def spilled(cubin):
    """Bytes of registers that a program keeps on its stack, read from the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Nothing else of these kernels is on a stack.
    return max(int(each) for each in re.findall(r"STACK:(\d+)", report))


def show(launch, *, look_for_spills):
    compiled = launch.compile()
    largest = max((v for v in launch.settings.values() if type(v) is int), default=0)
    code = compiled.asm
    print(
        "kernel",
        launch.name,
        largest,
        compiled.metadata.shared,
        spilled(code["cubin"]) if look_for_spills else -1,
        len(races(code["ttgir"])),
        flush=True,
    )


def main(architecture):
    triton.runtime.driver.set_active(AbsentDevice(target_of(architecture)))
    covered, seen = {}, set()
    for launch in listed(launch_all):
        key = (launch.kernel, *launch.settings.values(), *(each is None for each in launch.args))
        # A chunk is prepared in the same way whatever its width, in more steps.
        if key not in seen and not (
            launch.name == "prepare_kernel" and launch.settings["K"] != 128
        ):
            seen.add(key)
            covered[launch.kernel] = covered.get(launch.kernel, set()) | launch.traits()
            show(launch, look_for_spills="gated_delta_rule" in launch.kernel.fn.__module__)
    launches = []
    for op in ALL_OPS.values():
        if "triton" in op.implementations:
            found = listed(lambda op=op: run_examples(op, torch.bfloat16))
            print("op", op.name, *sorted({each.name for each in found}), flush=True)
            launches += found
    for launch in chosen(launches, covered):
        show(launch, look_for_spills=False)


if __name__ == "__main__":
    main(*sys.argv[1:])

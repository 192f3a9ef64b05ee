"""Compile every Triton kernel for a GPU that is not here.

Run as a script by `test_triton_compiles.py`, since Triton's interpreter, under which the other
tests run, cannot be left within a process. Argument: the architecture, such as `cuda:90`.

The launches of all example calls are listed first. Those that are compiled have together each value
of each flag and each mix of dtypes of a kernel; more of them differ in nothing that the interpreter
does not see. What models launch is compiled as it is. A launch goes as far as it has something to
show: to a binary for each kernel once, and where spills are looked for; at the sizes of models to
where shared memory is laid out; to the code for GPUs before that, `ttgir`, where a flag is switched
on; and to the code that is not yet for a device, `ttir`, where types or flags switched off differ.

Prints `op NAME KERNELS...` for the kernels that the examples of an op launch, and
`kernel NAME STAGE LARGEST SHARED SPILLED RACES` for each that is compiled: the last stage, the
largest constant, bytes of shared memory, bytes of registers that are spilled and
the number of tiles in shared memory that are overwritten too early; -1 for what is not looked for.
"""

import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from model_launches import launch_all
from shared_memory_races import races
from triton import knobs
from triton._C.libtriton import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction

from lme_kernels.examples import examples_of
from lme_kernels.functional import ALL_OPS
from lme_kernels.op import Op
from lme_kernels.testing import run

STAGES = ("ttir", "ttgir", "shared", "binary")
"""How far a launch may be compiled, in order."""


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

    def switched_on(self):
        """The traits that add code: flags that are on, and names."""
        return {each for each in self.traits() if isinstance(each[1], bool | str) and each[1]}

    def compile(self, last):
        """What the stages up to `last` make, by name, with `shared` bytes of memory."""
        with stopping_after(last) as made, suppress(StoppedError):
            self.kernel.run(*self.args, grid=self.grid, warmup=True, **self.settings)
        return made


class StoppedError(Exception):
    """A kernel is compiled as far as was asked for."""


@contextmanager
def stopping_after(last):
    """Keep what each stage of the compiler makes, and raise `StoppedError` after the stage `last`."""
    backend = type(make_backend(triton.runtime.driver.active.get_current_target()))
    made = {"shared": -1}
    module = None

    def keep(name, make, source, metadata):
        nonlocal module
        module = source
        code = make(source, metadata)
        made[name] = code if isinstance(code, bytes) else str(code)
        if "shared" in metadata:
            made["shared"] = metadata["shared"]
        if name == last:
            raise StoppedError
        return code

    def add_stages(self, stages, *others):
        add_all(self, stages, *others)
        stages.update({name: partial(keep, name, make) for name, make in stages.items()})

    def stop_before_llvm(passes, *options):
        passes.run(module, "shared")
        made["shared"] = module.get_int_attr("ttg.shared")
        raise StoppedError

    add_all, to_llvm = backend.add_stages, nvidia.passes.ttgpuir.add_to_llvmir
    backend.add_stages = add_stages
    if last == "shared":
        nvidia.passes.ttgpuir.add_to_llvmir = stop_before_llvm
    try:
        yield made
    finally:
        backend.add_stages, nvidia.passes.ttgpuir.add_to_llvmir = add_all, to_llvm


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
    """Pick few launches that have every trait of those of their kernel, beside what is covered.

    Returns:
        Launches, each with its last stage.
    """
    of_kernel = {}
    for each in launches:
        of_kernel.setdefault(each.kernel, []).append(each)
    found = []
    for kernel, group in of_kernel.items():
        if kernel not in covered:
            most = max(group, key=lambda each: len(each.switched_on()))
            found.append((most, "binary"))
            cover(covered, most, "binary")
        for last, traits in (("ttgir", Launch.switched_on), ("ttir", Launch.traits)):
            left = set().union(*(traits(each) for each in group)) - covered[kernel][last]
            while left:
                best = max(group, key=lambda each: len(traits(each) & left))
                found.append((best, last))
                cover(covered, best, last)
                left -= traits(best)
    return found


def cover(covered, launch, last):
    """Note that a launch is compiled up to a stage, and so up to those before it."""
    done = covered.setdefault(launch.kernel, {each: set() for each in STAGES})
    for each in STAGES[: STAGES.index(last) + 1]:
        done[each] |= launch.traits()


def spilled(cubin):
    """Bytes of registers that a program keeps on its stack, read from the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Nothing else of these kernels is on a stack.
    return max(int(each) for each in re.findall(r"STACK:(\d+)", report))


def show(launch, last, *, look_for_spills=False):
    code = launch.compile(last)
    largest = max((v for v in launch.settings.values() if type(v) is int), default=0)
    print(
        "kernel",
        launch.name,
        last,
        largest,
        code["shared"],
        spilled(code["cubin"]) if look_for_spills else -1,
        len(races(code["ttgir"])) if "ttgir" in code else -1,
        flush=True,
    )


def main(architecture, part="all"):
    triton.runtime.driver.set_active(AbsentDevice(target_of(architecture)))
    covered, seen = {}, set()
    for launch in listed(launch_all):
        key = (launch.kernel, *launch.settings.values(), *(each is None for each in launch.args))
        # A chunk is prepared in the same way whatever its width, in more steps.
        if key not in seen and not (
            launch.name == "prepare_kernel" and launch.settings["K"] != 128
        ):
            seen.add(key)
            look_for_spills = "gated_delta_rule" in launch.kernel.fn.__module__
            last = "binary" if look_for_spills or launch.kernel not in covered else "shared"
            if part == "models":
                look_for_spills, last = False, "shared"
            cover(covered, launch, last)
            show(launch, last, look_for_spills=look_for_spills)
    if part == "models":
        return
    launches = []
    for op in ALL_OPS.values():
        if "triton" in op.implementations:
            found = listed(lambda op=op: run_examples(op, torch.bfloat16))
            print("op", op.name, *sorted({each.name for each in found}), flush=True)
            launches += found
    for launch, last in chosen(launches, covered):
        show(launch, last)


if __name__ == "__main__":
    main(*sys.argv[1:])

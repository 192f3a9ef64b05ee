"""Compile the kernels of `gated_delta_rule` for Hopper at the sizes of models.

Run as a script by `ops/test_gated_delta_rule_triton.py`, since Triton's interpreter cannot be left
within a process. Prints a line a kernel: its name, the channels of a head, and bytes of shared
memory and of registers spilled. Without a GPU, spilling is read from the binary.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent))

from compile_triton import AbsentDevice, target_of

from lme_kernels.ops.gated_delta_rule._triton import gated_delta_rule
from lme_kernels.ops.linear_attention.arguments import ChunkOptions


def spilled(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Nothing else of these kernels is on a stack.
    return max(int(each) for each in re.findall(r"STACK:(\d+)", report))


def main():
    triton.runtime.driver.set_active(AbsentDevice(target_of("cuda:90")))
    run_kernel, size, seen = JITFunction.run, 0, set()

    def compile_only(self, *args, grid, warmup, **kwargs):
        key = (self.fn.__name__, size)
        # Preparing differs by size in the number of iterations only.
        if key not in seen and (size == 128 or self.fn.__name__ != "prepare_kernel"):
            seen.add(key)
            kernel = run_kernel(self, *args, grid=grid, warmup=True, **kwargs)
            print(*key, kernel.metadata.shared, spilled(kernel.asm["cubin"]), flush=True)

    JITFunction.run = compile_only

    def normal(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)

    for size in (64, 128, 256):
        heads = [normal(1, 64, 16, size) for _ in range(3)]
        gates = [normal(1, 64, 16) for _ in range(2)]
        y, _ = gated_delta_rule(*heads, *gates, None, None, True, ChunkOptions(1.0, 64))
        y.backward(y)


if __name__ == "__main__":
    main()

"""Compile the kernels of `gated_delta_rule` for Hopper at the sizes of models.

Run as a script by `ops/test_gated_delta_rule_triton.py`, since Triton's interpreter cannot be left
within a process. Prints a line a kernel: its name, the channels of a head, bytes of shared memory
and of registers spilled, and how many buffers are overwritten while tensor cores read them. Without
a GPU, spilling is read from the binary.
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


def overwritten(ttgir):
    """Count buffers of one tile that a loop loads into with products of that tile in flight.

    Triton loads ahead into one buffer what something besides a product reads, and may leave
    products unfinished until the next iteration: together they are a race.
    """
    tiles, buffers, copied, read, waiting, found, depth = {}, {}, set(), set(), False, 0, 0
    for line in ttgir.splitlines():
        if match := re.search(r"(%\w+) = ttg.local_alloc : \(\) -> !ttg.memdesc<(\d+)x", line):
            tiles[match[1]] = int(match[2])
        elif match := re.search(r"(%\w+) = ttg.memdesc_(?:index|trans) (%\w+)", line):
            buffers[match[1]] = buffers.get(match[2], match[2])
        elif "scf.for" in line:
            depth, copied, read, waiting = depth + 1, set(), set(), False
        elif depth and (match := re.search(r"async_copy_global_to_local %\w+, (%\w+)", line)):
            copied.add(buffers[match[1]])
        elif depth and (match := re.search(r"warp_group_dot (%\w+), (%\w+),", line)):
            read |= {buffers.get(each) for each in match.groups()}
        elif depth and (match := re.search(r"warp_group_dot_wait .*pendings = (\d+)", line)):
            # What is waited for before anything else is loaded cannot be overwritten.
            waiting = waiting or int(match[1]) > 0
        elif "scf.yield" in line:
            found += sum(tiles[each] == 1 for each in copied & read) if waiting else 0
            depth -= 1
    return found


def main():
    triton.runtime.driver.set_active(AbsentDevice(target_of("cuda:90")))
    run_kernel, size, seen = JITFunction.run, 0, set()

    def compile_only(self, *args, grid, warmup, **kwargs):
        key = (self.fn.__name__, size)
        # Preparing differs by size in the number of iterations only.
        if key not in seen and (size == 128 or self.fn.__name__ != "prepare_kernel"):
            seen.add(key)
            kernel = run_kernel(self, *args, grid=grid, warmup=True, **kwargs)
            bytes_of = kernel.metadata.shared, spilled(kernel.asm["cubin"])
            print(*key, *bytes_of, overwritten(kernel.asm["ttgir"]), flush=True)

    JITFunction.run = compile_only

    def normal(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)

    for size in (128, 256):
        heads = [normal(1, 64, 16, size) for _ in range(3)]
        gates = [normal(1, 64, 16) for _ in range(2)]
        y, _ = gated_delta_rule(*heads, *gates, None, None, True, ChunkOptions(1.0, 64))
        y.backward(y)


if __name__ == "__main__":
    main()

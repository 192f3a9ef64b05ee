"""Compile the kernels of linear attention as models launch them, for a GPU that is not here.

Run as a script by `test_linear_attention_compiles.py`, with the folder of `compile_triton.py` on
the path. Prints for each kernel the bytes of shared memory that a program takes.
"""

import sys

import torch
import triton
from compile_triton import AbsentDevice, target_of
from triton.runtime.jit import JITFunction

from lme_kernels.ops.linear_attention import _triton


def tokens_of(*shape, dtype=torch.bfloat16):
    return torch.empty(4, 128, *shape, dtype=dtype, requires_grad=True)


def attend(K, V, decay, heads=16, N=16, *, mamba=False, dtype=torch.bfloat16):
    """Launch forward and backward of a call."""
    query, key = tokens_of(heads, K, dtype=dtype), tokens_of(heads, K, dtype=dtype)
    value = tokens_of(N, V, dtype=dtype)
    log_decay = factor = skip = None
    if decay is not None:
        log_decay = tokens_of(N, *((K,) if decay == "channel" else ()), dtype=torch.float32)
    if mamba:
        factor, skip = tokens_of(N, dtype=torch.float32), torch.empty(N, requires_grad=True)
    y, _ = _triton.attend(query, key, value, log_decay, factor, skip, None, None, 0.1, True)
    y.backward(torch.empty_like(y))


def main(architecture):
    triton.runtime.driver.set_active(AbsentDevice(target_of(architecture)))
    run_kernel = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run_kernel(self, *args, grid=grid, warmup=True, **kwargs)
        print(self.fn.__name__, compiled.metadata.shared, flush=True)

    JITFunction.run = compile_only
    # The widest take the most.
    attend(256, 256, "head")
    attend(256, 256, "channel")
    attend(128, 128, None)
    attend(128, 64, "head", 1, 32, mamba=True)
    attend(128, 128, "head", 4, 4, dtype=torch.float32)


if __name__ == "__main__":
    main(*sys.argv[1:])

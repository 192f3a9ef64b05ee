"""Compile the kernels over tables of tensors for a GPU that is not here.

Run as a script by `test_optim_compiles.py`. Prints the name of every kernel with the widths of its
loads of global memory, in bits; argument: the architecture, such as `cuda:90`.
"""

import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lme_kernels.optim import _triton_adamw, _triton_norm, _triton_tables
from lme_kernels.optim.batch import AdamWBatch, AdamWSettings


class AbsentDevice:
    """Answers what the compiler asks a driver."""

    def __init__(self, target):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def batch(dtype):
    values = [torch.zeros(70000, dtype=dtype) for _ in range(2)]
    means = [torch.zeros(70000) for _ in range(2)]
    return AdamWBatch(values[:1], values[1:], means[:1], means[1:], [torch.zeros(())], [0])


def settings(**changes):
    given = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "maximize": False,
        "stochastic_rounding": False,
        "seed": 0,
        "grad_scale": None,
        "found_inf": None,
    }
    return AdamWSettings(**{**given, **changes})


def main(architecture):
    number = int(architecture.partition(":")[2])
    triton.runtime.driver.set_active(AbsentDevice(GPUTarget("cuda", number, 32)))
    run_kernel = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run_kernel(self, *args, grid=grid, warmup=True, **kwargs)
        widths = re.findall(r"ld\.global\S*?\.v(\d)\.[bf](\d+)", kernel.asm["ptx"])
        widest = max((int(count) * int(bits) for count, bits in widths), default=0)
        print(self.fn.__name__, widest, flush=True)

    JITFunction.run = compile_only
    scalar = torch.ones(())
    for dtype in (torch.float32, torch.bfloat16):
        _triton_adamw.adamw(batch(dtype), settings(stochastic_rounding=True))
        _triton_norm.grad_norm([torch.zeros(70000, dtype=dtype)])
        _triton_norm.scale_by_norm([torch.zeros(70000, dtype=dtype)], scalar, 1.0)
    on_device = settings(lr=scalar, grad_scale=scalar, found_inf=scalar, maximize=True, seed=2**40)
    _triton_adamw.adamw(batch(torch.float32), on_device)
    _triton_tables.write_numbers(torch.zeros(40, dtype=torch.int64), tuple(range(40)))


if __name__ == "__main__":
    main(sys.argv[1])

"""Triton kernels run under Triton's interpreter where there is no GPU.

The variable is read when `@triton.jit` runs, so it is set before any test module is imported.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

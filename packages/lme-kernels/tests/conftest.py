"""Triton kernels run under Triton's interpreter where there is no GPU.

The variable is read when `@triton.jit` runs, so it is set before any test module is imported.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def gpu_memory_is_given_back():
    """Several processes share a GPU: what one kept for its next allocation, another lacks."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

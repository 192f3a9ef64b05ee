"""The two rates of a device that no kernel passes, measured in the same run."""

from dataclasses import dataclass
from functools import partial

import torch

from lme_kernels.bench.timing import Stopwatch


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates of one device."""

    copy: float
    """Bytes a second of a large copy, read and written ones counted."""
    matmul: float
    """Floating-point operations a second of a large matrix product."""


def measure_ceilings(watch: Stopwatch, dtype: torch.dtype) -> Ceilings:
    """Measure both.

    Args:
        watch: Times on the device.
        dtype: Dtype of the matrices.

    Returns:
        The rates.
    """
    large = watch.device.type == "cuda"
    source = torch.randn(2**28 if large else 2**20, device=watch.device)
    copied = 2 * source.numel() * source.element_size()
    copy = copied / watch.times(partial(torch.empty_like(source).copy_, source)).median
    n = 8192 if large else 256
    a, b = (torch.randn(n, n, device=watch.device, dtype=dtype) for _ in range(2))
    matmul = 2.0 * n**3 / watch.times(lambda: a @ b).median
    return Ceilings(copy, matmul)

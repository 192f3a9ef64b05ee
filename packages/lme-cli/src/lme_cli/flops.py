"""Model FLOPs and the device's peak, where they are known."""

import torch

from lme_cli.planning import device_name
from lme_core import flops
from lme_core.config import ModelConfig


def flops_per_token(config: ModelConfig, sequence_length: int | None) -> float | None:
    """Give the FLOPs of training one token; `None` where rows have no fixed length."""
    if sequence_length is None:
        return None
    return flops.flops_per_token(config, sequence_length)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Give the data sheet's dense FLOP/s of a device; `None` for a CPU or an unknown one."""
    return None if device.type == "cpu" else flops.device_peak_flops(device_name(device), dtype)


def count(config: ModelConfig) -> tuple[int, int]:
    """Count all parameters, and those besides embeddings."""
    counted = flops.count_parameters(config)
    return counted.total, counted.total - counted.embedding

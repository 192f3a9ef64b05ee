"""Parameters and floating-point operations of a model, from its config; peaks of devices."""

from dataclasses import dataclass

import torch

from lme_core.config import ModelConfig
from lme_kernels.policy import KernelPolicy

_EMBEDDINGS = ("embedding.weight", "position_embedding.weight", "lm_head.weight")

# Dense peak of the matrix units in TFLOP/s, from the makers' data sheets: (bfloat16, float16,
# float32 without TF32), `None` where there is none. The first entry whose words are all in a
# device's name holds, so a name stands before its own beginning.
_PEAKS: tuple[tuple[str, tuple[float | None, float | None, float | None]], ...] = (
    ("gb200", (2500.0, 2500.0, 80.0)),
    ("b200", (2250.0, 2250.0, 75.0)),
    ("gh200", (989.4, 989.4, 66.9)),
    ("h200 nvl", (835.5, 835.5, 60.0)),
    ("h200", (989.4, 989.4, 66.9)),
    ("h100 pcie", (756.0, 756.0, 51.2)),
    ("h100 nvl", (835.5, 835.5, 60.0)),
    ("h100", (989.4, 989.4, 66.9)),
    ("h800", (989.4, 989.4, 66.9)),
    ("h20", (148.0, 148.0, 44.0)),
    ("a100", (312.0, 312.0, 19.5)),
    ("a800", (312.0, 312.0, 19.5)),
    ("a40", (149.7, 149.7, 37.4)),
    ("a30", (165.0, 165.0, 10.3)),
    ("a10g", (70.0, 70.0, 35.0)),
    ("a10", (125.0, 125.0, 31.2)),
    ("l40s", (362.0, 362.0, 91.6)),
    ("l40", (181.0, 181.0, 90.5)),
    ("l4", (121.0, 121.0, 30.3)),
    ("v100", (None, 125.0, 15.7)),
    ("tesla t4", (None, 65.0, 8.1)),
    ("rtx 5090", (209.5, 209.5, 104.8)),
    ("rtx 4090", (165.2, 165.2, 82.6)),
    ("rtx 3090", (71.0, 71.0, 35.6)),
    ("mi355x", (2500.0, 2500.0, 157.3)),
    ("mi350x", (2300.0, 2300.0, 144.2)),
    ("mi325x", (1307.4, 1307.4, 163.4)),
    ("mi300x", (1307.4, 1307.4, 163.4)),
    ("mi250x", (383.0, 383.0, 95.7)),
    ("tpu v6e", (918.0, None, None)),
    ("tpu v5p", (459.0, None, None)),
    ("tpu v5e", (197.0, None, None)),
    ("tpu v4", (275.0, None, None)),
)
_COLUMNS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Numbers of parameters."""

    total: int
    """All."""
    active: int
    """Those that a token uses: all but the experts it is not sent to."""
    embedding: int
    """Those of the token and position embeddings and of the output layer."""


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count parameters without allocating them.

    Args:
        config: The architecture.
    """
    with torch.device("meta"):
        model = config.build(KernelPolicy())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    inactive = sum(mlp.inactive_parameters(config) for mlp in config.mlps())
    return ParameterCount(total, total - inactive, sum(sizes.get(name, 0) for name in _EMBEDDINGS))


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of training, per token.

    Counted are matrix products, a multiplication and an addition each, forward and twice that
    backward; attention over the keys that causality and window let a token see. Not counted are
    recomputation, elementwise work and the embedding's look-up.

    Args:
        config: The architecture.
        sequence_length: Tokens of a sequence, taken as one document.
    """
    layers = config.block_flops(sequence_length)
    return 3.0 * (layers + 2.0 * config.hidden_size * config.vocab_size)


def device_peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """Peak of a device's matrix units, dense, in floating-point operations a second.

    Args:
        name: As `torch.cuda.get_device_name` gives it, or "TPU v5e" and the like.
        dtype: Of the operands.

    Returns:
        The data sheet's figure; `None` where the device or the dtype is not in the table.
    """
    if dtype not in _COLUMNS:
        return None
    words = name.lower().replace("-", " ")
    for pattern, peaks in _PEAKS:
        if pattern in words:
            peak = peaks[_COLUMNS.index(dtype)]
            return None if peak is None else peak * 1e12
    return None

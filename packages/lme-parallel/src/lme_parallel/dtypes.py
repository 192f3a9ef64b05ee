"""Names of dtypes in a run file."""

import torch

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


def torch_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype that a run file calls `name`; `None` stays."""
    return None if name is None else _DTYPES[name]

"""What a test process returns, as JSON: plain values, containers and tensors; nothing runs on load."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def write_result(path: Path, result: Any) -> None:
    """Write what a process returned.

    Args:
        path: File to make.
        result: Tensors, numbers, strings, `None`, and lists, tuples and dicts of them.

    Raises:
        TypeError: If it holds anything else.
    """
    path.write_text(json.dumps(_plain(result)), encoding="utf-8")


def read_result(path: Path) -> Any:
    """Read what `write_result` wrote; tensors come back on the CPU."""
    return _value(json.loads(path.read_text(encoding="utf-8")))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        text = base64.b64encode(data.tobytes()).decode()
        return {"tensor": text, "dtype": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, tuple):
        return {"tuple": [_plain(each) for each in value]}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {"pairs": [[_plain(key), _plain(each)] for key, each in value.items()]}
    raise TypeError(f"a test process cannot return {type(value).__name__}; return plain values")


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_value(each) for each in plain]
    if not isinstance(plain, dict):
        return plain
    if "pairs" in plain:
        return {_value(key): _value(each) for key, each in plain["pairs"]}
    if "tuple" in plain:
        return tuple(_value(each) for each in plain["tuple"])
    dtype = getattr(torch, plain["dtype"].removeprefix("torch."))
    result = torch.empty(plain["shape"], dtype=dtype)
    if result.numel() > 0:
        data = np.frombuffer(base64.b64decode(plain["tensor"]), dtype=np.uint8)
        result.view(-1).view(torch.uint8).numpy()[:] = data
    return result

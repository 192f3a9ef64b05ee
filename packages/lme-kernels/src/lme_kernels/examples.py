"""Example calls of every op: what proofs, compile checks and `lme kernels check` run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lme_kernels.op import Op


@dataclass(frozen=True, slots=True)
class Example:
    """One call of an op's public function."""

    name: str
    """What the case is there for, in a few words."""
    arguments: tuple[Any, ...]
    """Positional arguments; floating-point tensors are float32 on the CPU, to be converted."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments."""
    constants: tuple[int, ...] = ()
    """Positions of floating-point arguments that get no gradient."""


def examples_of(op: Op) -> list[Example]:
    """Make the example calls of `op`, small enough for an interpreter.

    They are defined beside the reference, in `ops/<op>/examples.py`, by `examples(normal)`.

    Args:
        op: The op.

    Returns:
        The calls, the same numbers each time.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    module = import_module(f"lme_kernels.ops.{op.name}.examples")
    make: Callable[[Callable[..., Tensor]], list[Example]] = vars(module)["examples"]
    return make(normal)

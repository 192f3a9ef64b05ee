"""What is measured: a call with its tensors, and the least work that any code must do for it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Cost:
    """The least that any implementation must move and compute."""

    forward_bytes: float
    """Each input read once and each output written once."""
    backward_bytes: float
    """The same for the gradients, with what the forward had to keep for them."""
    forward_flops: float = 0.0
    """Multiplications and additions of matrix products."""
    backward_flops: float = 0.0
    """The same for the gradients, nothing computed again."""


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of a public function."""

    arguments: tuple[Any, ...]
    """Positional arguments; floating-point tensors get gradients."""
    cost: Cost
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments."""
    constants: frozenset[int] = frozenset()
    """Positions of floating-point arguments that get no gradient."""

    def prepared(self) -> tuple[tuple[Any, ...], list[Tensor]]:
        """Give fresh leaves that share memory with the arguments.

        Returns:
            Arguments, and those of them that get gradients.
        """
        arguments: list[Any] = []
        leaves: list[Tensor] = []
        for position, argument in enumerate(self.arguments):
            if isinstance(argument, Tensor) and argument.is_floating_point():
                argument = argument.detach()
                if position not in self.constants:
                    leaves.append(argument.requires_grad_())
            arguments.append(argument)
        return tuple(arguments), leaves


class Draw:
    """Draws random tensors for a call, the same each time."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Start the generator.

        Args:
            device: Where tensors are made.
            dtype: Dtype of floating-point tensors.
        """
        self.device = device
        self.dtype = dtype
        self.element = dtype.itemsize
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(
            shape, generator=self._generator, device=self.device, dtype=dtype or self.dtype
        )

    def uniform(self, *shape: int) -> Tensor:
        """Numbers between 0 and 1."""
        drawn = torch.rand(shape, generator=self._generator, device=self.device)
        return drawn.to(self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers below `high`, int64."""
        return torch.randint(high, shape, generator=self._generator, device=self.device)

    def choices(self, rows: int, k: int, high: int) -> Tensor:
        """`k` distinct integers below `high` a row, int64."""
        return torch.rand((rows, high), generator=self._generator, device=self.device).topk(k)[1]

    def offsets(self, lengths: Sequence[int]) -> Tensor:
        """Starts of sequences of these lengths, and their sum at the end, int32."""
        starts = torch.tensor([0, *lengths], device=self.device)
        return starts.cumsum(0).to(torch.int32)


@dataclass(frozen=True, slots=True)
class Case:
    """One size of one op."""

    op: str
    name: str
    """Sizes in words."""
    make: Callable[[Draw], Call]

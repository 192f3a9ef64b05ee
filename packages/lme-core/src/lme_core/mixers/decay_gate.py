"""How much of a state each token leaves, as Mamba 2 learns it, and how that starts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lme_core.layers import random
from lme_core.layers.initialization import ParameterSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DecayGateFields:
    """Where the decay of a state starts."""

    A_init_min: float = 0.0
    """Least initial rate of decay, exclusive."""
    A_init_max: float = 16.0
    """Greatest initial rate of decay; rates are uniform in between."""
    dt_init_min: float = 1e-3
    """Least initial step."""
    dt_init_max: float = 0.1
    """Greatest initial step; logarithms of steps are uniform in between."""
    dt_init_floor: float = 1e-4
    """Initial steps below this are raised to it."""

    def check_decay(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If one is empty or below zero.
        """
        if not 0 <= self.A_init_min < self.A_init_max:
            raise ValueError(
                f"`A_init_min` must be at least 0 and below `A_init_max`, got {self.A_init_min} "
                f"and {self.A_init_max}"
            )
        if not 0 < self.dt_init_min <= self.dt_init_max:
            raise ValueError(
                f"`dt_init_min` must be above 0 and at most `dt_init_max`, got {self.dt_init_min} "
                f"and {self.dt_init_max}"
            )
        if self.dt_init_floor <= 0:
            raise ValueError(f"`dt_init_floor` must be above 0, got {self.dt_init_floor}")


@dataclass(frozen=True, slots=True)
class LogRate:
    """Logarithms of numbers that are uniform between two bounds."""

    low: float
    """Lower bound, exclusive."""
    high: float
    """Upper bound."""

    def __call__(
        self, key: int, shape: Sequence[int], region: Sequence[slice] | None = None
    ) -> Tensor:
        """Compute a region; see `Initializer`."""
        # One minus a draw from [0, 1) is never zero, whose logarithm is infinite.
        share = 1.0 - _uniform(key, shape, region)
        return (self.low + share * (self.high - self.low)).log().float()


@dataclass(frozen=True, slots=True)
class InverseSoftplusStep:
    """What the softplus turns into steps whose logarithms are uniform between two bounds."""

    low: float
    """Lower bound of the steps."""
    high: float
    """Upper bound of the steps."""
    floor: float
    """Steps below this are raised to it."""

    def __call__(
        self, key: int, shape: Sequence[int], region: Sequence[slice] | None = None
    ) -> Tensor:
        """Compute a region; see `Initializer`."""
        low, high = math.log(self.low), math.log(self.high)
        step = (low + _uniform(key, shape, region) * (high - low)).exp().clamp(min=self.floor)
        # log(exp(step) - 1), without the cancellation.
        return (step + (-torch.expm1(-step)).log()).float()


def _uniform(key: int, shape: Sequence[int], region: Sequence[slice] | None) -> Tensor:
    """Draw a region of a vector from [0, 1): float64, each number of the key and its index."""
    ((first, last),) = random.region_bounds(shape, region)
    index = torch.arange(first + 1, last + 1, dtype=torch.int64)
    return random.uniform(torch.tensor(key), index).double()


class DecayGate(nn.Module):
    """A rate of decay a head, and what is added to its steps before the softplus."""

    def __init__(self, heads: int, fields: DecayGateFields, *, mup: bool) -> None:
        """Allocate without initialising.

        Args:
            heads: Number of heads.
            fields: Where they start.
            mup: Whether the learning rate of the rates follows the width.
        """
        super().__init__()
        self.fields = fields
        self.mup = mup
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))

    def parameter_specs(self) -> Mapping[str, ParameterSpec]:
        """Specs of `A_log` and `dt_bias`; neither is decayed."""
        start = self.fields
        rate = LogRate(start.A_init_min, start.A_init_max)
        step = InverseSoftplusStep(start.dt_init_min, start.dt_init_max, start.dt_init_floor)
        return {
            "A_log": ParameterSpec(rate, weight_decay=False, mup=self.mup),
            "dt_bias": ParameterSpec(step, weight_decay=False),
        }

    def rate(self) -> Tensor:
        """Rate of each head, negative, shape (heads,), in at least float32."""
        return -self.A_log.to(_compute(self.A_log)).exp()

    def step(self, dt: Tensor) -> Tensor:
        """Turn what a token says into steps above zero.

        Args:
            dt: Shape (..., heads).

        Returns:
            softplus(dt + dt_bias), shape (..., heads), in at least float32.
        """
        compute = _compute(dt)
        return F.softplus(dt.to(compute) + self.dt_bias.to(compute))

    def forward(self, dt: Tensor) -> Tensor:
        """Logarithm of what a token multiplies the state with.

        Args:
            dt: Shape (..., heads).

        Returns:
            -exp(A_log) softplus(dt + dt_bias), shape (..., heads), in at least float32.
        """
        return self.rate() * self.step(dt)


def _compute(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

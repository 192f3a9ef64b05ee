"""Rotary position embedding: frequencies, their rescaling for longer contexts, and tables."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Discriminator, Tag
from torch import Tensor

from lme_core.layers.unions import tag_of


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Positions divided by a factor (Chen et al. 2023, arXiv:2306.15595)."""

    rope_type: Literal["linear"] = "linear"
    """Kind of scaling."""
    factor: float
    """New context length over the original."""

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(self, inverse: list[float], theta: float) -> list[float]:
        """Rescale; see `inverse_frequencies`."""
        return [each / self.factor for each in inverse]

    @property
    def magnitude(self) -> float:
        """Factor of cosines and sines."""
        return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """Low frequencies interpolated, high ones kept (Peng et al. 2023, arXiv:2309.00071)."""

    rope_type: Literal["yarn"] = "yarn"
    """Kind of scaling; a mapping without a kind is of this one."""
    factor: float
    """New context length over the original."""
    original_max_position_embeddings: int
    """Context length that the frequencies were trained for, in tokens."""
    beta_fast: float = 32.0
    """Channels that turn more often than this over the original context are kept."""
    beta_slow: float = 1.0
    """Channels that turn less often than this are interpolated in full."""
    attention_factor: float | None = None
    """Factor of cosines and sines; absent: 0.1 * ln(factor) + 1, or that of the two below."""
    mscale: float | None = None
    """With `mscale_all_dim`: the magnitude is the ratio of 0.1 * m * ln(factor) + 1 of both."""
    mscale_all_dim: float | None = None
    """See `mscale`."""
    truncate: bool = True
    """Whether the bounds of the ramp between the two regimes are rounded to whole channels."""

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_original(self.original_max_position_embeddings)

    def frequencies(self, inverse: list[float], theta: float) -> list[float]:
        """Rescale; see `inverse_frequencies`."""
        dim = 2 * len(inverse)

        def channel(rotations: float) -> float:
            turns = self.original_max_position_embeddings / (2 * math.pi * rotations)
            return dim * math.log(turns) / (2 * math.log(theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        scaled = []
        for j, frequency in enumerate(inverse):
            interpolated = min(max((j - low) / (high - low), 0.0), 1.0)
            scaled.append(frequency * (1.0 - interpolated) + frequency / self.factor * interpolated)
        return scaled

    @property
    def magnitude(self) -> float:
        """Factor of cosines and sines."""

        def scale(multiplier: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * multiplier * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Long wavelengths interpolated, short ones kept, a smooth step between (Llama 3.1)."""

    rope_type: Literal["llama3"] = "llama3"
    """Kind of scaling."""
    factor: float
    """Factor by which long wavelengths are stretched."""
    original_max_position_embeddings: int
    """Context length that the frequencies were trained for, in tokens."""
    low_freq_factor: float = 1.0
    """Wavelengths above the original context over this are stretched in full."""
    high_freq_factor: float = 4.0
    """Wavelengths below the original context over this are kept."""

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_original(self.original_max_position_embeddings)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"`rope_scaling.low_freq_factor` must be below `high_freq_factor`, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )

    def frequencies(self, inverse: list[float], theta: float) -> list[float]:
        """Rescale; see `inverse_frequencies`."""
        scaled = []
        for frequency in inverse:
            turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            kept = min(max(kept, 0.0), 1.0)
            scaled.append(frequency * kept + frequency / self.factor * (1.0 - kept))
        return scaled

    @property
    def magnitude(self) -> float:
        """Factor of cosines and sines."""
        return 1.0


def _kind(value: Any) -> str | None:
    return tag_of(value, "rope_type", default="yarn")


def _spell(value: Any) -> Any:
    """Map the spellings in use to ours: `type` for `rope_type`, none for YaRN, "default"."""
    if not isinstance(value, Mapping):
        return value
    settings = dict(value)
    kind = settings.pop("type", "yarn")
    settings.setdefault("rope_type", kind)
    return None if settings["rope_type"] == "default" else settings


# `Any` above: what a run file holds before it is validated.
RopeScaling = (
    Annotated[
        Annotated[LinearScaling, Tag("linear")]
        | Annotated[YarnScaling, Tag("yarn")]
        | Annotated[Llama3Scaling, Tag("llama3")],
        Discriminator(_kind),
    ]
    | None
)
RopeScalingField = Annotated[RopeScaling, BeforeValidator(_spell)]


def inverse_frequencies(
    dim: int, theta: float, scaling: LinearScaling | YarnScaling | Llama3Scaling | None = None
) -> list[float]:
    """Angles per position of each pair of channels, in radians.

    Args:
        dim: Number of channels that rotate, even.
        theta: Base of the frequencies.
        scaling: How they are changed for longer contexts.

    Returns:
        dim / 2 numbers, falling from 1.

    Source: Su et al. 2021, equation 15 (arXiv:2104.09864).
    """
    inverse = [theta ** (-2 * j / dim) for j in range(dim // 2)]
    return inverse if scaling is None else scaling.frequencies(inverse, theta)


class Rotary:
    """Cosines and sines for a model's positions; no parameters, no buffers."""

    def __init__(
        self,
        dim: int,
        theta: float,
        scaling: LinearScaling | YarnScaling | Llama3Scaling | None = None,
    ) -> None:
        """Choose the frequencies.

        Args:
            dim: Number of channels that rotate, even.
            theta: Base of the frequencies.
            scaling: How they are changed for longer contexts.
        """
        self.frequencies = inverse_frequencies(dim, theta, scaling)
        self.magnitude = 1.0 if scaling is None else scaling.magnitude
        # Functions of their keys alone: frequencies, and the longest table asked for so far.
        self._inverse: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def table(
        self, length: int, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 to `length` - 1, computed once.

        Args:
            length: Number of positions.
            device: Where the result lives.
            dtype: At least float32: the angles need it.

        Returns:
            Two tensors of shape (length, dim), the second half a copy of the first.
        """
        table = self._tables.get((device, dtype))
        if table is None or len(table[0]) < length:
            # Outside inference mode, or a table made there could not serve training later.
            with torch.inference_mode(mode=False), torch.no_grad():
                table = self.at(torch.arange(length, device=device), dtype=dtype)
            if _is_real(table[0]):
                self._tables[(device, dtype)] = table
        cos, sin = table
        return cos[:length], sin[:length]

    def at(self, positions: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of given positions.

        Args:
            positions: Integers of any shape.
            dtype: At least float32: the angles need it.

        Returns:
            Two tensors of the shape of `positions` and one more dim of size dim.
        """
        angles = positions[..., None].to(dtype) * self._frequencies(positions.device, dtype)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude

    def _frequencies(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Copy the frequencies to a device, once: a copy makes the host wait for it."""
        inverse = self._inverse.get((device, dtype))
        if inverse is None:
            with torch.inference_mode(mode=False), torch.no_grad():
                # Rounded once, on the CPU: not every device has float64.
                inverse = torch.tensor(self.frequencies, dtype=torch.float64).to(dtype).to(device)
            if _is_real(inverse):
                self._inverse[(device, dtype)] = inverse
        return inverse


def _is_real(x: Tensor) -> bool:
    """Say whether `x` holds numbers: a tracer's stand-in must not outlive the trace."""
    return type(x) is Tensor


def _check_factor(factor: float) -> None:
    if factor < 1:
        raise ValueError(f"`rope_scaling.factor` must be at least 1, got {factor}")


def _check_original(length: int) -> None:
    if length < 1:
        raise ValueError(
            f"`rope_scaling.original_max_position_embeddings` must be at least 1, got {length}"
        )

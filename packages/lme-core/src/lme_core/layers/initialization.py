"""Initial values and optimizer traits of parameters, declared where a parameter is made."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lme_core.layers import random
from lme_core.layers.settings import ModelSettings


class Initializer(Protocol):
    """Initial values of one parameter, computable for any rectangular region of it."""

    def __call__(
        self, key: int, shape: Sequence[int], region: Sequence[slice] | None = None
    ) -> Tensor:
        """Compute a region.

        Args:
            key: Hash of the seed and the parameter's name.
            shape: Shape of the whole parameter.
            region: One slice a dim; `None` is the whole.

        Returns:
            float32 on the CPU, of the region's shape.
        """
        ...


@dataclass(frozen=True, slots=True)
class Normal:
    """Independent normal numbers of mean zero."""

    std: float
    """Standard deviation."""

    def __call__(
        self, key: int, shape: Sequence[int], region: Sequence[slice] | None = None
    ) -> Tensor:
        """Compute a region; see `Initializer`."""
        return random.normal(key, shape, region, std=self.std)


@dataclass(frozen=True, slots=True)
class Constant:
    """One value everywhere."""

    value: float
    """That value."""

    def __call__(
        self, key: int, shape: Sequence[int], region: Sequence[slice] | None = None
    ) -> Tensor:
        """Compute a region; see `Initializer`."""
        sizes = [last - first for first, last in random.region_bounds(shape, region)]
        return torch.full(sizes, self.value)


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """What is known of a parameter before it has values."""

    initial: Initializer
    """Its initial values."""
    weight_decay: bool = True
    """Whether optimizers decay it."""
    mup: bool = False
    """Whether maximal update parametrisation divides its learning rate by `m_width`."""


@runtime_checkable
class HasParameters(Protocol):
    """A module that owns parameters directly."""

    def parameter_specs(self) -> Mapping[str, ParameterSpec]:
        """Specs of the parameters that are its own, by their local names."""
        ...


@runtime_checkable
class HasBuffers(Protocol):
    """A module that owns buffers which are saved with the model."""

    def buffer_specs(self) -> Mapping[str, ParameterSpec]:
        """Specs of the buffers that are its own, by their local names."""
        ...


@dataclass(frozen=True, slots=True)
class ParameterTraits:
    """How an optimizer treats a parameter."""

    weight_decay: bool
    """Whether it is decayed. Biases, norms and state matrices are not."""
    mup: bool
    """Whether its learning rate is divided by `m_width` where that method is on. A parameter that
    is marked and not decayed gets the scaled learning rate and no decay."""


def collect_specs(model: nn.Module) -> dict[str, ParameterSpec]:
    """List the specs of all parameters of a model.

    Args:
        model: Any module made of modules that know their parameters.

    Returns:
        By fully qualified name, in the order of `named_parameters`.

    Raises:
        ValueError: If a parameter has no spec, or a spec no parameter.
    """
    specs: dict[str, ParameterSpec] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, HasParameters):
            dot = f"{prefix}." if prefix else ""
            specs |= {f"{dot}{name}": spec for name, spec in module.parameter_specs().items()}
    return _ordered("parameters", [name for name, _ in model.named_parameters()], specs)


def collect_buffer_specs(model: nn.Module) -> dict[str, ParameterSpec]:
    """List the specs of all buffers of a model, those that are not saved among them.

    Args:
        model: Any module made of modules that know their buffers.

    Returns:
        By fully qualified name, in the order of `named_buffers`.

    Raises:
        ValueError: If a buffer has no spec, or a spec no buffer.
    """
    specs: dict[str, ParameterSpec] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, HasBuffers):
            dot = f"{prefix}." if prefix else ""
            specs |= {f"{dot}{name}": spec for name, spec in module.buffer_specs().items()}
    return _ordered("buffers", [name for name, _ in model.named_buffers()], specs)


def _ordered(
    kind: str, names: Sequence[str], specs: Mapping[str, ParameterSpec]
) -> dict[str, ParameterSpec]:
    if set(names) != set(specs):
        difference = ", ".join(sorted(set(names) ^ set(specs)))
        raise ValueError(f"{kind} and their specs differ in: {difference}")
    return {name: specs[name] for name in names}


def linear_std(settings: ModelSettings, fan_in: int, *, output: bool = False) -> float:
    """Standard deviation of the initial weights of a linear layer inside a block.

    Args:
        settings: The architecture.
        fan_in: Number of its inputs.
        output: Whether it writes to the residual stream; with `use_depth_scaled_init` it then
            starts smaller by sqrt(2 * num_layers).

    Source: Radford et al. 2019, section 2.3, for depth; Yang et al. 2022 (arXiv:2203.03466) for
    `mup`.
    """
    match settings.init_method:
        case "normal":
            std = settings.initializer_range
        case "mup":
            std = settings.initializer_range / math.sqrt(settings.m_width or 1.0)
        case "fan_in":
            std = 1.0 / math.sqrt(fan_in)
    if output and settings.use_depth_scaled_init:
        std /= math.sqrt(2 * settings.num_layers)
    return std

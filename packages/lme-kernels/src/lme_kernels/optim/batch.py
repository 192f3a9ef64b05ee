"""What one update is given: tensors in step with each other, and settings of their group."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AdamWBatch:
    """Tensors of one dtype on one device; entry i of each list belongs to parameter i."""

    parameters: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    """Means of gradients, at least float32."""
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    """Means of their squares, at least float32."""
    steps: list[Tensor] = field(default_factory=list)
    """Number of updates before this one, 0-d float32."""
    indices: list[int] = field(default_factory=list)
    """Number of each parameter in the optimizer: part of the key of random bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWSettings:
    """Settings of a group of parameters."""

    lr: float | Tensor
    """Learning rate; a 0-d tensor on the parameters' device can change between replays."""
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool
    stochastic_rounding: bool
    """Whether bfloat16 parameters are rounded at random."""
    seed: int
    """Seed of that, 64 bits."""
    grad_scale: Tensor | None
    """0-d: gradients are divided by it; `None` for 1."""
    found_inf: Tensor | None
    """0-d: nothing is updated if it is not zero; `None` for zero."""

"""What each torch optimizer takes as `optimizer_args.class_args`, with its defaults.

The defaults are torch's, except AdamW's, which are the run file's (learning rate 1e-5, weight decay
0.1, betas 0.9 and 0.95). A file that gives some keys keeps the defaults of the others.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

_PREFIX = "optimizer_args.class_args"


def _check_at_least(minimum: float, **values: float) -> None:
    for name, value in values.items():
        if not value >= minimum:
            raise ValueError(f"`{_PREFIX}.{name}` must be at least {minimum:g}, got {value}")


def _check_fractions(name: str, values: tuple[float, ...]) -> None:
    if not all(0 <= value < 1 for value in values):
        raise ValueError(f"`{_PREFIX}.{name}` must be at least 0 and below 1, got {values}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassArgs:
    """What all of them take."""

    # Twice, as the schema of a subclass reads only annotations of the fields it inherits.
    lr: Annotated[float, Field(description="Learning rate, before the schedule's factor.")] = 1e-3
    """Learning rate, before the schedule's factor."""
    weight_decay: Annotated[
        float, Field(description="Coefficient of the decay of weights (not of biases and norms).")
    ] = 0.0
    """Coefficient of the decay of weights (not of biases and norms)."""
    maximize: Annotated[bool, Field(description="Go up the gradient instead of down.")] = False
    """Go up the gradient instead of down."""
    foreach: Annotated[
        bool | None,
        Field(description="Update many tensors a call; null: torch's choice if not fused."),
    ] = None
    """Update many tensors a call; null: torch's choice if not fused."""

    def __post_init__(self) -> None:
        _check_at_least(0, lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdadeltaClassArgs(ClassArgs):
    """`torch.optim.Adadelta`."""

    lr: float = 1.0
    """Learning rate, before the schedule's factor."""
    rho: float = 0.9
    """Decay of the running means."""
    eps: float = 1e-6
    """Added under the root."""
    capturable: bool = False
    """Safe to capture in a CUDA graph."""

    def __post_init__(self) -> None:
        ClassArgs.__post_init__(self)
        _check_at_least(0, eps=self.eps)
        _check_fractions("rho", (self.rho,))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdagradClassArgs(ClassArgs):
    """`torch.optim.Adagrad`."""

    lr: float = 1e-2
    """Learning rate, before the schedule's factor."""
    lr_decay: float = 0.0
    """Decay of the learning rate per step, besides the schedule."""
    initial_accumulator_value: float = 0.0
    """Where the sums of squares start."""
    eps: float = 1e-10
    """Added to the denominator."""
    fused: bool | None = None
    """One kernel for the update; null: where it exists."""

    def __post_init__(self) -> None:
        ClassArgs.__post_init__(self)
        initial = self.initial_accumulator_value
        _check_at_least(0, lr_decay=self.lr_decay, initial_accumulator_value=initial, eps=self.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamClassArgs(ClassArgs):
    """`torch.optim.Adam`: the decay is added to the gradient."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean and of the running square."""
    eps: Annotated[float, Field(description="Added to the denominator.")] = 1e-8
    """Added to the denominator."""
    amsgrad: Annotated[bool, Field(description="Divide by the largest running square so far.")] = (
        False
    )
    """Divide by the largest running square so far."""
    capturable: Annotated[bool, Field(description="Safe to capture in a CUDA graph.")] = False
    """Safe to capture in a CUDA graph."""
    fused: Annotated[
        bool | None, Field(description="One kernel for the update; null: where it exists.")
    ] = None
    """One kernel for the update; null: where it exists."""

    def __post_init__(self) -> None:
        ClassArgs.__post_init__(self)
        _check_at_least(0, eps=self.eps)
        _check_fractions("betas", self.betas)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWClassArgs(AdamClassArgs):
    """`torch.optim.AdamW`: the decay acts on the weights alone."""

    lr: float = 1e-5
    """Learning rate, before the schedule's factor."""
    weight_decay: float = 0.1
    """Coefficient of the decay of weights (not of biases and norms)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running mean and of the running square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamaxClassArgs(ClassArgs):
    """`torch.optim.Adamax`."""

    lr: float = 2e-3
    """Learning rate, before the schedule's factor."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean and of the running maximum."""
    eps: float = 1e-8
    """Added to the denominator."""
    capturable: bool = False
    """Safe to capture in a CUDA graph."""

    def __post_init__(self) -> None:
        ClassArgs.__post_init__(self)
        _check_at_least(0, eps=self.eps)
        _check_fractions("betas", self.betas)


@dataclass(frozen=True, slots=True, kw_only=True)
class ASGDClassArgs(ClassArgs):
    """`torch.optim.ASGD`."""

    lr: float = 1e-2
    """Learning rate, before the schedule's factor."""
    lambd: float = 1e-4
    """Decay term."""
    alpha: float = 0.75
    """Power of the learning rate's decay."""
    t0: float = 1e6
    """Step at which averaging starts."""
    capturable: bool = False
    """Safe to capture in a CUDA graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NAdamClassArgs(ClassArgs):
    """`torch.optim.NAdam`."""

    lr: float = 2e-3
    """Learning rate, before the schedule's factor."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean and of the running square."""
    eps: float = 1e-8
    """Added to the denominator."""
    momentum_decay: float = 4e-3
    """Decay of the momentum."""
    decoupled_weight_decay: bool = False
    """Decay as AdamW does."""
    capturable: bool = False
    """Safe to capture in a CUDA graph."""

    def __post_init__(self) -> None:
        ClassArgs.__post_init__(self)
        _check_at_least(0, eps=self.eps, momentum_decay=self.momentum_decay)
        _check_fractions("betas", self.betas)


@dataclass(frozen=True, slots=True, kw_only=True)
class RAdamClassArgs(ClassArgs):
    """`torch.optim.RAdam`."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean and of the running square."""
    eps: float = 1e-8
    """Added to the denominator."""
    decoupled_weight_decay: bool = False
    """Decay as AdamW does."""
    capturable: bool = False
    """Safe to capture in a CUDA graph."""

    def __post_init__(self) -> None:
        ClassArgs.__post_init__(self)
        _check_at_least(0, eps=self.eps)
        _check_fractions("betas", self.betas)


@dataclass(frozen=True, slots=True, kw_only=True)
class RMSpropClassArgs(ClassArgs):
    """`torch.optim.RMSprop`."""

    lr: float = 1e-2
    """Learning rate, before the schedule's factor."""
    alpha: float = 0.99
    """Decay of the running square."""
    eps: float = 1e-8
    """Added to the denominator."""
    momentum: float = 0.0
    """Decay of the running update."""
    centered: bool = False
    """Divide by the running variance instead of the running square."""
    capturable: bool = False
    """Safe to capture in a CUDA graph."""

    def __post_init__(self) -> None:
        ClassArgs.__post_init__(self)
        _check_at_least(0, alpha=self.alpha, eps=self.eps, momentum=self.momentum)


@dataclass(frozen=True, slots=True, kw_only=True)
class RpropClassArgs:
    """`torch.optim.Rprop`, which has no weight decay."""

    lr: float = 1e-2
    """First step size, before the schedule's factor."""
    etas: tuple[float, float] = (0.5, 1.2)
    """Factors by which a step size shrinks and grows."""
    step_sizes: tuple[float, float] = (1e-6, 50.0)
    """Smallest and largest step size."""
    maximize: bool = False
    """Go up the gradient instead of down."""
    foreach: bool | None = None
    """Update many tensors a call; null: torch's choice."""
    capturable: bool = False
    """Safe to capture in a CUDA graph."""

    def __post_init__(self) -> None:
        _check_at_least(0, lr=self.lr)
        if not 0 < self.etas[0] < 1 < self.etas[1]:
            raise ValueError(
                f"`{_PREFIX}.etas` must be a shrinking factor in (0, 1) and a growing one above "
                f"1, got {self.etas}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SGDClassArgs(ClassArgs):
    """`torch.optim.SGD`."""

    momentum: float = 0.0
    """Decay of the running update."""
    dampening: float = 0.0
    """Of the gradient in the running update."""
    nesterov: bool = False
    """Look ahead along the momentum."""
    fused: bool | None = None
    """One kernel for the update; null: where it exists."""

    def __post_init__(self) -> None:
        ClassArgs.__post_init__(self)
        _check_at_least(0, momentum=self.momentum)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"`{_PREFIX}.nesterov` needs a `momentum` above 0 and `dampening` 0, got "
                f"{self.momentum} and {self.dampening}"
            )

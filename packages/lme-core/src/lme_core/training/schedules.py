"""How the learning rate changes over a run: warmup, a constant stretch, then one decay."""

from dataclasses import dataclass, field
from typing import Literal

from lme_core.training.args import warn_no_effect


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtraLRSchedulerArgs:
    """Constants of the power decay: `lr * factor = min(lr, a * (n * c) ** b)` at step `n`."""

    a: float | None = None
    """Scale; suggested: the global batch size."""
    b: float | None = None
    """Exponent, below 0; suggested: -0.51."""
    c: float | None = None
    """Tokens per step; suggested: global batch size times sequence length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LRSchedulerArgs:
    """The learning rate's factor over the run, counted in optimizer steps."""

    num_warmup_steps: int = 200
    """Steps over which the factor rises linearly from 0."""
    num_constant_steps: int = 0
    """Steps at factor 1 after the warmup."""
    num_decay_steps: int | None = None
    """Steps of decay; null: all that remain."""
    lr_decay_style: Literal["constant", "cosine", "exponential", "linear", "power"] = "cosine"
    """Shape of the decay."""
    lr_decay_factor: float = 0.1
    """Factor at the end of the decay, kept from there on."""
    extra_lr_scheduler_args: ExtraLRSchedulerArgs = field(default_factory=ExtraLRSchedulerArgs)
    """Constants of the power decay."""

    def __post_init__(self) -> None:
        for name, value in (
            ("num_warmup_steps", self.num_warmup_steps),
            ("num_constant_steps", self.num_constant_steps),
            ("num_decay_steps", self.num_decay_steps),
            ("lr_decay_factor", self.lr_decay_factor),
        ):
            if value is not None and value < 0:
                raise ValueError(f"`lr_scheduler_args.{name}` must be at least 0, got {value}")
        style = self.lr_decay_style
        if style == "constant" and self.num_decay_steps:
            raise ValueError(
                "`lr_scheduler_args.num_decay_steps` must be 0 or null with `lr_decay_style: "
                f"constant`, got {self.num_decay_steps}"
            )
        extra = self.extra_lr_scheduler_args
        given = [x for x in (extra.a, extra.b, extra.c) if x is not None]
        if style != "power" and given:
            warn_no_effect(
                "lr_scheduler_args.extra_lr_scheduler_args", f"`lr_decay_style` is {style}"
            )
        if style == "power":
            if len(given) < 3:
                raise ValueError(
                    "`lr_decay_style: power` needs `a`, `b` and `c` in "
                    "`lr_scheduler_args.extra_lr_scheduler_args`, for instance a: 4, b: -0.51, "
                    "c: 8192 (batch size, exponent, tokens per step)"
                )
            if self.num_constant_steps:
                raise ValueError(
                    "`lr_scheduler_args.num_constant_steps` must be 0 with `lr_decay_style: "
                    f"power`, got {self.num_constant_steps}"
                )

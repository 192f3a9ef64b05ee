"""How the learning rate changes over a run: warmup, a constant stretch, then one decay."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

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
            if self.num_decay_steps is not None:
                warn_no_effect("lr_scheduler_args.num_decay_steps", "`lr_decay_style` is power")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """Where a run's warmup, constant stretch and decay begin and end, in optimizer steps."""

    warmup_end: int
    """Last step of the warmup; 0: none."""
    constant_end: int
    """Last step at the full rate."""
    decay_end: int
    """Step at which the decay is complete."""
    final_factor: float
    """Factor from `decay_end` on."""
    peak_learning_rate: float
    """Learning rate of the optimizer's first group, before any factor."""
    extra: ExtraLRSchedulerArgs
    """Constants of the power decay."""

    def progress(self, step: int) -> float:
        """Return the fraction of the decay that is done at `step`, in [0, 1]."""
        length = self.decay_end - self.constant_end
        if length <= 0:
            return 1.0
        return min(max((step - self.constant_end) / length, 0.0), 1.0)


def constant(step: int, course: Course) -> float:
    """Stay at 1."""
    return 1.0


def cosine(step: int, course: Course) -> float:
    """Fall along half a cosine."""
    F = course.final_factor
    return F + (1 - F) * (1 + math.cos(math.pi * course.progress(step))) / 2


def linear(step: int, course: Course) -> float:
    """Fall along a line."""
    t = course.progress(step)
    return (1 - t) + course.final_factor * t


def exponential(step: int, course: Course) -> float:
    """Fall along `exp(-t)`, stretched so that it starts at 1 and ends at the final factor."""
    t, F = course.progress(step), course.final_factor
    if t == 1:
        return F
    scale = (1 - F) * math.e / (math.e - 1)
    shift = (F * math.e - 1) / (math.e - 1)
    return scale * math.exp(-t) + shift


def power(step: int, course: Course) -> float:
    """Fall with a power of the tokens seen, for runs whose length is not known beforehand.

    Source: Shen et al. 2024, equation 5 (arXiv:2408.13359).
    """
    extra = course.extra
    if extra.a is None or extra.b is None or extra.c is None:
        raise ValueError("`lr_decay_style: power` needs `a`, `b` and `c`")
    if step == 0 or course.peak_learning_rate == 0:
        return 1.0
    return min(1.0, extra.a / course.peak_learning_rate * (step * extra.c) ** extra.b)


DECAYS: Mapping[str, Callable[[int, Course], float]] = {
    "constant": constant,
    "cosine": cosine,
    "exponential": exponential,
    "linear": linear,
    "power": power,
}


def factor(step: int, course: Course, decay: Callable[[int, Course], float]) -> float:
    """Return the learning rate's factor after `step` optimizer steps.

    Args:
        step: Optimizer steps done, from 0.
        course: Where the phases begin and end.
        decay: One of `DECAYS`.

    Returns:
        The factor; the warmup rises linearly from 0 to the decay's value at its end.
    """
    if step < course.warmup_end:
        peak = power(course.warmup_end, course) if decay is power else 1.0
        return step / course.warmup_end * peak
    if step <= course.constant_end and decay is not power:
        return 1.0
    return decay(step, course)


class Schedule:
    """Sets the learning rate of every group of an optimizer, step by step."""

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> None:
        """Take the groups' learning rates as the rates at factor 1, and set those of step 0.

        Args:
            optimizer: Its groups' `lr` is written.
            factor: From optimizer steps done to the factor.
        """
        self._optimizer = optimizer
        self._factor = factor
        self._base = [float(group["lr"]) for group in optimizer.param_groups]
        self._continued = False
        self._position = 0
        self._apply()

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update in the first group."""
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """Move on by one optimizer step."""
        self._position += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Return the position and rates, fit for JSON."""
        groups = self._optimizer.param_groups
        return {
            "position": self._position,
            "learning_rates": [float(group["lr"]) for group in groups],
            "continued_from": list(self._base) if self._continued else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved position, on this run's schedule.

        Rates and lengths are those of this run's file: a changed learning rate takes effect.

        Args:
            state: From `state_dict`.
        """
        if state["continued_from"] is not None:
            self._continue(state["continued_from"])
        self._position = int(state["position"])
        self._apply()

    def continue_from(self, state: Mapping[str, Any], position: int) -> None:
        """Start this schedule from the rates that an earlier run had reached.

        For a second phase under another schedule: the rates saved become the rates at factor 1.

        Args:
            state: `state_dict` of the earlier run.
            position: Optimizer steps this run counts as done; 0 if it counts anew.
        """
        self._continue(state["learning_rates"])
        self._position = position
        self._apply()

    def _continue(self, rates: Sequence[float]) -> None:
        if len(rates) != len(self._base):
            raise ValueError(
                f"the checkpoint's schedule has {len(rates)} parameter groups and this run's "
                f"optimizer {len(self._base)}; set `load_args.resume_learning_rate: false`"
            )
        self._base = [float(rate) for rate in rates]
        self._continued = True

    def _apply(self) -> None:
        factor = self._factor(self._position)
        for group, base in zip(self._optimizer.param_groups, self._base, strict=True):
            group["lr"] = base * factor


def build_schedule(
    args: LRSchedulerArgs, optimizer: torch.optim.Optimizer, num_training_steps: int
) -> Schedule:
    """Build the schedule of a run.

    Args:
        args: `lr_scheduler_args` of the run file.
        optimizer: Whose learning rates are set.
        num_training_steps: Length of the run, where the decay ends by default.

    Returns:
        A schedule at step 0; with a warmup, the first update has learning rate 0.
    """
    constant_end = args.num_warmup_steps + args.num_constant_steps
    decay_end = num_training_steps
    if args.num_decay_steps is not None:
        decay_end = constant_end + args.num_decay_steps
    course = Course(
        warmup_end=args.num_warmup_steps,
        constant_end=constant_end,
        decay_end=decay_end,
        final_factor=args.lr_decay_factor,
        peak_learning_rate=float(optimizer.param_groups[0]["lr"]),
        extra=args.extra_lr_scheduler_args,
    )
    decay = DECAYS[args.lr_decay_style]
    return Schedule(optimizer, lambda step: factor(step, course, decay))

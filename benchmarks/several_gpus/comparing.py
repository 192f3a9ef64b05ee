"""How far the losses of two runs are apart, and how far two right ones may be."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ALLOWED = 2.0
"""Times the noise. Each of two right runs may be as far from what exact numbers would give as the
noise says, so that two are at most twice that apart."""

WRITTEN = 2.0**-23
"""The least that counts as noise: losses are written down in fp32."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Relative differences of losses, step by step."""

    first: float
    """Of the first step, which only the forward pass has a part in."""
    largest: float
    step: int
    """Where the largest one is."""


def compare(found: Mapping[Any, float], expected: Mapping[Any, float]) -> Difference | None:
    """Compare losses by step, as far as both go; `None` if they share none.

    Args:
        found: Of a layout.
        expected: Of one GPU.
    """
    # Steps are text in JSON.
    left, right = ({int(step): loss for step, loss in each.items()} for each in (found, expected))
    apart = {
        step: abs(left[step] - right[step]) / abs(right[step])
        for step in sorted(left)
        if step in right
    }
    if not apart:
        return None
    # A loss that is no number is as far off as can be.
    apart = {step: each if each == each else float("inf") for step, each in apart.items()}
    step = max(apart, key=lambda each: apart[each])
    return Difference(next(iter(apart.values())), apart[step], step)


def noise(runs: Iterable[Mapping[Any, float]], expected: Mapping[Any, float]) -> float | None:
    """Return how far right runs on one GPU are apart; `None` without any.

    Args:
        runs: Losses of runs that round differently, and compute the same.
        expected: Of the run that they are compared with.
    """
    found = [compare(each, expected) for each in runs]
    largest = [each.largest for each in found if each is not None]
    return max(largest) if largest else None

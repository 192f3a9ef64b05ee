"""Lists of corpora as run files give them: prefixes, with or without weights."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Blend:
    """Corpora to draw from and their shares."""

    prefixes: tuple[str, ...]
    """Prefixes of `.bin/.idx` pairs."""
    weights: tuple[float, ...] | None
    """Shares that sum to 1, or `None`: the corpora one after another."""


def parse_blend(value: str | list[str | float], setting: str = "data_path") -> Blend:
    """Read one prefix, a list of prefixes, or alternating weights and prefixes.

    Weighted form needs numbers (or numbers written as text) at every even place; anything else
    is a list of prefixes.

    Args:
        value: As in the run file.
        setting: Name of the setting, for errors.

    Returns:
        The prefixes, and their weights divided by their sum.

    Raises:
        ValueError: If the list is empty, a weight is not positive and finite, or a number stands
            where a prefix should.
    """
    items = [value] if isinstance(value, str) else list(value)
    if not items:
        raise ValueError(f"`{setting}` is an empty list: give at least one prefix")
    weights = [_as_number(item) for item in items[0::2]]
    is_weighted = len(items) % 2 == 0 and all(weight is not None for weight in weights)
    prefixes = items[1::2] if is_weighted else items
    for prefix in prefixes:
        if not isinstance(prefix, str) or not prefix:
            raise ValueError(
                f"`{setting}` has {prefix!r} where a prefix is expected: write prefixes only, "
                "or a weight before each prefix"
            )
    names = tuple(str(prefix) for prefix in prefixes)
    if not is_weighted:
        return Blend(names, None)
    shares = [weight for weight in weights if weight is not None]
    if any(not (math.isfinite(weight) and weight > 0) for weight in shares):
        raise ValueError(f"weights in `{setting}` must be positive numbers, got {shares}")
    total = math.fsum(shares)
    return Blend(names, tuple(weight / total for weight in shares))


def _as_number(item: str | float) -> float | None:
    try:
        return float(item)
    except ValueError:
        return None

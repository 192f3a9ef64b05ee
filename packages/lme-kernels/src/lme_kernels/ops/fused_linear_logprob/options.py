"""Options of the log-probabilities of a linear layer's output."""

from typing import NamedTuple


class LogprobOptions(NamedTuple):
    """Options in the order implementations take them."""

    ignore_index: int
    temperature: float
    entropy: bool
    reduction: str = "none"

    @property
    def outputs(self) -> tuple[int, ...]:
        """Shape of one row's results."""
        return (2,) if self.entropy else ()


def check_temperature(temperature: float) -> None:
    """Check a divisor of logits.

    Raises:
        ValueError: If it is not above 0.
    """
    if not temperature > 0.0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}")

"""What the losses over a vocabulary have in common."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class VocabularyShard(NamedTuple):
    """The part of the classes that a call holds, where they are divided among processes."""

    start: int
    """First class of this part; labels count from class 0 of the whole vocabulary."""
    size: int
    """Classes of all parts together."""
    reduce: Callable[[Tensor, str], Tensor]
    """Takes a float32 tensor, small and contiguous, and "max" or "sum"; returns the elementwise
    maximum or sum over all processes that hold a part. Called once with each, in this order, by
    every process alike, and never in the backward."""


class LossOptions(NamedTuple):
    """Options of a cross-entropy, in the order its implementations take them."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    reduction: str
    shard: VocabularyShard | None = None

    def check(self) -> "LossOptions":
        """Return itself if every option is in range.

        Raises:
            ValueError: If one is not.
        """
        check_reduction(self.reduction)
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"`label_smoothing` must be from 0 to 1, got {self.label_smoothing}")
        if self.z_loss < 0.0:
            raise ValueError(f"`z_loss` must be at least 0, got {self.z_loss}")
        if self.softcap is not None and self.softcap <= 0.0:
            raise ValueError(
                f"`softcap` must be above 0 (or `None` for no bound), got {self.softcap}"
            )
        return self

    def classes(self, V: int) -> int:
        """Count the classes of the whole vocabulary, of which a call holds `V`."""
        return V if self.shard is None else self.shard.size


def check_reduction(reduction: str) -> None:
    """Check the name of a reduction.

    Raises:
        ValueError: If there is none of that name.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f'`reduction` must be "none", "sum" or "mean", got {reduction!r}')

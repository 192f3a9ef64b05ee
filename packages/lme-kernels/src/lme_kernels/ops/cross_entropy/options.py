"""What the losses over a vocabulary have in common."""

from typing import NamedTuple


class LossOptions(NamedTuple):
    """Options of a cross-entropy, in the order its implementations take them."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    reduction: str

    def check(self) -> "LossOptions":
        """Return itself if every option is in range.

        Raises:
            ValueError: If one is not.
        """
        if self.reduction not in ("none", "sum", "mean"):
            raise ValueError(f'`reduction` must be "none", "sum" or "mean", got {self.reduction!r}')
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"`label_smoothing` must be from 0 to 1, got {self.label_smoothing}")
        if self.z_loss < 0.0:
            raise ValueError(f"`z_loss` must be at least 0, got {self.z_loss}")
        if self.softcap is not None and self.softcap <= 0.0:
            raise ValueError(
                f"`softcap` must be above 0 (or `None` for no bound), got {self.softcap}"
            )
        return self

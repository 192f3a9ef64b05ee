"""What one block hands to the next, and one pipeline stage to the next."""

from typing import NamedTuple

from torch import Tensor


class Stream(NamedTuple):
    """The residual stream, and what else of earlier blocks the later ones read."""

    x: Tensor
    """Residual stream, shape (B, S, H)."""
    carried: tuple[Tensor, ...] = ()
    """Tensors of rank 3 or more whose first dims are batch and sequence. Which ones, is the
    architecture's business; between two layers of a model there are always the same."""

    def last_token(self) -> "Stream":
        """Return the stream of each row's last token, (B, 1, ...) each."""
        return Stream(self.x[:, -1:], tuple(each[:, -1:] for each in self.carried))

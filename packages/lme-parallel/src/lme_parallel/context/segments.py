"""The documents of rows that are cut, as a process sees them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lme_parallel.context.layout import Layout


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the sequences of whole rows are among the tokens that are here.

    Each document of the batch stays one sequence, of no token where it is elsewhere.
    """

    bounds: Tensor | None
    """Of the sequences here, over the B * C tokens, shape (documents + 1,); `None` where each row is
    one sequence."""
    first: Tensor | None
    """Number of the document of each row's first token here, shape (B,)."""
    last: Tensor | None
    """Number of the document of each row's last token here, shape (B,)."""
    before: Tensor | None
    """Tokens of the first document that other processes have before those here, shape (B,)."""

    @classmethod
    def of(cls, B: int, C: int, cu_seqlens: Tensor | None, layout: Layout) -> "Segments":
        """Find the sequences.

        Args:
            B: Rows.
            C: Tokens of a row that are here, one stretch.
            cu_seqlens: Bounds of the documents in the B * W * C tokens of the whole rows, none of
                which goes on in the next row; `None` where each row is one.
            layout: Where they are.
        """
        if cu_seqlens is None:
            return cls(None, None, None, None)
        S, start = C * layout.size, C * layout.rank
        rows = torch.div(cu_seqlens, S, rounding_mode="floor")
        bounds = rows * C + (cu_seqlens - rows * S - start).clamp(0, C)
        beginning = torch.arange(B, device=bounds.device, dtype=bounds.dtype) * S + start
        first = torch.searchsorted(cu_seqlens, beginning, right=True) - 1
        last = torch.searchsorted(cu_seqlens, beginning + C - 1, right=True) - 1
        return cls(bounds, first, last, beginning - cu_seqlens[first])

    def to_sequences(self, states: Tensor) -> Tensor:
        """Hand the states before rows to their first sequences, where those began before.

        Args:
            states: Shape (B, ...).

        Returns:
            Shape (sequences, ...), zeros for sequences that begin here.
        """
        if self.bounds is None or self.first is None or self.before is None:
            return states
        goes_on = (self.before > 0).view(-1, *(1,) * (states.ndim - 1))
        whole = states.new_zeros(len(self.bounds) - 1, *states.shape[1:])
        return whole.index_copy(0, self.first, states.where(goes_on, 0.0))

    def to_halo(self, halo: Tensor) -> Tensor:
        """Do the same for inputs before rows, of which some belong to other sequences.

        Args:
            halo: Shape (B, channels, width), the latest last.

        Returns:
            Shape (sequences, channels, width).
        """
        if self.before is None:
            return halo
        width = halo.shape[-1]
        distance = torch.arange(width, 0, -1, device=halo.device)
        inside = distance <= self.before[:, None]
        return self.to_sequences(halo.where(inside[:, None], 0.0))

    def last_of_rows(self, states: Tensor) -> Tensor:
        """Return the states after rows.

        Args:
            states: After the sequences, shape (sequences, ...).

        Returns:
            Shape (B, ...).
        """
        return states if self.last is None else states[self.last]

    def factor_of_rows(self, log_decay: Tensor) -> Tensor:
        """Return what is left of the states before rows after them.

        Args:
            log_decay: Logarithm of each token's factor, shape (B, C, N), or (B * C, N) where
                documents are packed.

        Returns:
            Shape (B, N): the product of the factors, or 0 where a sequence begins.
        """
        if self.first is None or self.last is None or self.before is None:
            return log_decay.sum(1).exp()
        factor = log_decay.unflatten(0, (len(self.first), -1)).sum(1).exp()
        goes_through = (self.first == self.last) & (self.before > 0)
        return factor.where(goes_through[:, None], 0.0)

"""Which parts of a sequence each process has: arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """How sequences are cut over the processes of a context group.

    A sequence is a row of equally long pieces, numbered along it. A process has one of them, or,
    where the work is balanced, one of the first half and its mirror image of the second: those
    before see few tokens, those behind see many.
    """

    size: int
    """Processes, W."""
    rank: int
    """Number of this one, from 0."""
    is_balanced: bool
    """Whether a process has pieces r and 2W - 1 - r of 2W; otherwise piece r of W."""

    @property
    def num_pieces(self) -> int:
        """Pieces of a sequence."""
        return self.size * self.pieces_each

    @property
    def pieces_each(self) -> int:
        """Pieces of a process."""
        return 2 if self.is_balanced else 1

    def pieces(self, rank: int | None = None) -> tuple[int, ...]:
        """Numbers of a process's pieces, ascending; of this one unless another is named."""
        rank = self.rank if rank is None else rank
        return (rank, self.num_pieces - 1 - rank) if self.is_balanced else (rank,)

    def owner(self, piece: int) -> int:
        """Which process has a piece."""
        return min(piece, self.num_pieces - 1 - piece) if self.is_balanced else piece

    def cut(self, x: Tensor, rank: int | None = None) -> Tensor:
        """Return what a process has of whole sequences.

        Args:
            x: Shape (B, S, ...), with S a multiple of the number of pieces.
            rank: Number of the process; this one unless it is given.

        Returns:
            Shape (B, S / W, ...), its pieces in order.
        """
        parts = x.chunk(self.num_pieces, dim=1)
        mine = [parts[piece] for piece in self.pieces(rank)]
        return torch.cat(mine, dim=1) if len(mine) > 1 else mine[0].contiguous()

    def join(self, parts: Sequence[Tensor], *, dim: int = 1) -> Tensor:
        """Put what the processes have together, in the order of the sequence.

        Args:
            parts: Of each process, in the order of their ranks, equally long along `dim`.
            dim: Where the tokens are.
        """
        if not self.is_balanced:
            return torch.cat(list(parts), dim=dim)
        halves = [part.chunk(2, dim=dim) for part in parts]
        return torch.cat(
            [first for first, _ in halves] + [second for _, second in reversed(halves)], dim=dim
        )

    def starts(self, length: int, rank: int | None = None) -> tuple[int, ...]:
        """Places in the sequence where a process's pieces of that length begin."""
        return tuple(piece * length for piece in self.pieces(rank))

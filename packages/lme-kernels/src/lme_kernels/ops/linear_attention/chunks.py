"""Sequences cut into chunks, for references of recurrences with a matrix for a state."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lme_kernels.precision import compute_dtype


def chunk_table(cu_seqlens: Tensor, total_tokens: int, chunk_size: int) -> Tensor:
    """List the chunks of packed sequences, on the device and without waiting for it.

    Args:
        cu_seqlens: Offsets of the sequences, shape (sequences + 1,), int32 or int64.
        total_tokens: Number of packed tokens.
        chunk_size: Most tokens of a chunk.

    Returns:
        Shape (4, chunks), int64, for as many chunks as there can be: the sequence of each chunk,
        its first token, its number of tokens, and its place in the sequence. The chunks of a
        sequence follow each other; those past the last have no tokens and sequence `sequences`.
    """
    offsets = cu_seqlens.long()
    first = first_chunks(offsets, chunk_size)
    num_chunks = max(1, total_tokens // chunk_size + cu_seqlens.shape[0] - 1)
    chunk = torch.arange(num_chunks, device=cu_seqlens.device)
    owner = torch.searchsorted(first, chunk, right=True) - 1
    place = chunk - first[owner]
    start = offsets[owner] + place * chunk_size
    end = F.pad(offsets, (0, 1))[owner + 1]
    length = (end - start).clamp(0, chunk_size)
    return torch.stack((owner, start, length, place))


def first_chunks(cu_seqlens: Tensor, chunk_size: int) -> Tensor:
    """Count the chunks before each sequence, shape (sequences + 1,), int64."""
    counts = (cu_seqlens.long().diff() + chunk_size - 1) // chunk_size
    return F.pad(counts.cumsum(0), (1, 0))


class Chunks:
    """The tokens of a call as (rows, chunks, chunk_size): a row a sequence, or one row if packed."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> None:
        self._cu_seqlens = cu_seqlens
        self._size = chunk_size
        self._compute = compute_dtype(x.dtype)
        self._tokens = x.shape[: 2 if cu_seqlens is None else 1]
        if cu_seqlens is None:
            self._num_chunks = max(1, (x.shape[1] + chunk_size - 1) // chunk_size)
            return
        table = chunk_table(cu_seqlens, x.shape[0], chunk_size)
        self._owner, start, length, self._place = table.unbind(0)
        self._num_chunks = table.shape[1]
        column = torch.arange(chunk_size, device=x.device)
        # Tokens that are not there read the row of zeros after the last.
        self._index = torch.where(column < length[:, None], start[:, None] + column, x.shape[0])

    def split(self, x: Tensor, N: int) -> Tensor:
        """Cut `x` into chunks, zeros where there is no token, to compute with.

        Args:
            x: Shape (B, S, heads, ...), or (T, heads, ...) if packed; heads divide `N`.
            N: Number of heads of the recurrence.

        Returns:
            Shape (rows, N, chunks, chunk_size, ...), in at least float32.
        """
        x = x.to(self._compute)
        if self._cu_seqlens is None:
            pads = self._num_chunks * self._size - x.shape[1]
            x = torch.cat((x, x.new_zeros((x.shape[0], pads, *x.shape[2:]))), 1)
            x = x.unflatten(1, (self._num_chunks, self._size))
        else:
            x = torch.cat((x, x.new_zeros((1, *x.shape[1:]))))[self._index].unsqueeze(0)
        return x.movedim(3, 1).repeat_interleave(N // x.shape[3], 1)

    def merge(self, y: Tensor) -> Tensor:
        """Undo `split`: shape (B, S, N, ...), or (T, N, ...) if packed."""
        y = y.movedim(1, 3)
        if self._cu_seqlens is None:
            return y.flatten(1, 2)[:, : self._tokens[1]]
        token = torch.arange(self._tokens[0], device=y.device)
        offsets = self._cu_seqlens.long()
        owner = torch.searchsorted(offsets, token, right=True) - 1
        place = token - offsets[owner]
        first = first_chunks(offsets, self._size)[owner] * self._size
        return y.flatten(0, 2)[first + place]

    def scan(
        self,
        initial: Tensor | None,
        shape: tuple[int, ...],
        step: Callable[[int, Tensor], Tensor],
        like: Tensor,
    ) -> Tensor:
        """Carry a state over the chunks of each sequence.

        Args:
            initial: State before each sequence, shape (sequences, *shape); `None` for zeros.
            shape: Shape of a state.
            step: Takes the number of a chunk and the states before it, shape (rows, *shape), and
                returns those after it; a chunk without tokens must not change them.
            like: A tensor on the device.

        Returns:
            The states after each sequence, shape (sequences, *shape).
        """
        if initial is not None:
            start = initial.to(self._compute)
        else:
            offsets = self._cu_seqlens
            sequences = self._tokens[0] if offsets is None else offsets.shape[0] - 1
            start = like.new_zeros((sequences, *shape), dtype=self._compute)
        if self._cu_seqlens is None:
            state = start
            for chunk in range(self._num_chunks):
                state = step(chunk, state)
            return state
        padded = torch.cat((start, start.new_zeros((1, *shape))))
        state = start.new_zeros((1, *shape))
        after = []
        for chunk in range(self._num_chunks):
            begins = self._place[chunk] == 0
            state = step(chunk, torch.where(begins, padded[self._owner[chunk : chunk + 1]], state))
            after.append(state)
        first = first_chunks(self._cu_seqlens, self._size)
        final = torch.cat(after)[(first[1:] - 1).clamp(min=0)]
        empty = (first.diff() == 0).view(-1, *(1 for _ in shape))
        return torch.where(empty, start, final)

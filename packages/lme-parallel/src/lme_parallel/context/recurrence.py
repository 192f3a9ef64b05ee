"""Recurrences along sequences that are cut over processes: states and inputs are handed on."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lme_parallel.context.collectives import from_contiguous, gather, to_contiguous
from lme_parallel.context.layout import Layout
from lme_parallel.context.ring import Ring
from lme_parallel.context.segments import Segments
from lme_parallel.context.states import hand_on, receive
from lme_parallel.tensor.collectives import Group

Run = Callable[[Tensor | None], tuple[Tensor, Tensor]]


def cut_recurrence(
    mixer: Any,  # of the seam
    layout: Layout,
    group: Group,
    ring: Ring,
    *,
    uncompiled: Callable[[Callable[..., Tensor]], Callable[..., Tensor]],
) -> None:
    """Let a recurrent mixer run on sequences that are cut.

    Where pieces are balanced they are exchanged for neighbouring ones before the mixer, and back
    after it: a state goes along the sequence once.

    Args:
        mixer: Has `exchange_state`, `exchange_halo`, `state_shape`, `state_heads_dim` and `part`.
            Changed in place.
        layout: How sequences are cut.
        group: The processes.
        ring: The same, for messages between neighbours.
        uncompiled: Keeps a compiler out of a function, where there is one.
    """
    exchange = _Exchange(layout, group, ring)
    mixer.exchange_state = exchange.state
    mixer.exchange_halo = exchange.halo
    forward = mixer.forward

    # Only the instance changes: a wrapping module would rename every parameter below it.
    @wraps(forward)
    def cut(x: Tensor, context: Any, cache: Any) -> Tensor:  # the mixer's own arguments
        if cache is not None:
            raise ValueError(
                "`context_parallel_world_size` above 1 has no caches for generation; generate from"
                " a checkpoint with `context_parallel_world_size: 1`"
            )
        if layout.is_balanced:
            x = to_contiguous(x, layout, group)
        exchange.begin(x, context.cu_seqlens, _state_shape(mixer))
        if context.cu_seqlens is not None:
            context = replace(context, cu_seqlens=exchange.segments.bounds)
        y = forward(x, context, None)
        return from_contiguous(y, layout, group) if layout.is_balanced else y

    mixer.forward = uncompiled(cut)


def _state_shape(mixer: Any) -> tuple[int, ...]:  # of the seam
    """Shape of the state of one sequence, as far as this process has its heads."""
    if mixer.state_shape is None:
        return ()
    shape = list(mixer.state_shape)
    shape[mixer.state_heads_dim] //= mixer.part[1]
    return tuple(shape)


class _Exchange:
    """What a mixer asks other processes for, in one call of it at a time."""

    def __init__(self, layout: Layout, group: Group, ring: Ring) -> None:
        self._layout = layout
        self._group = group
        self._ring = ring

    def begin(self, x: Tensor, cu_seqlens: Tensor | None, state_shape: tuple[int, ...]) -> None:
        """Take note of what the mixer is called with.

        Args:
            x: Its input, shape (B, C, H), the process's part of the sequence from rank to rank.
            cu_seqlens: Bounds of documents in whole rows.
            state_shape: Of the state of one sequence.
        """
        B, C = x.shape[:2]
        self.segments = Segments.of(B, C, cu_seqlens, self._layout)
        self._state_shape = (B, *state_shape)
        self._dtype = torch.promote_types(x.dtype, torch.float32)
        self._device = x.device

    def state(
        self,
        run: Run,
        initial: Tensor | None,
        *,
        cu_seqlens: Tensor | None,
        log_decay: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run a recurrence from the states that are really before the sequences.

        Args:
            run: Takes states before the sequences here, and returns outputs and last states.
            initial: Has to be `None`.
            cu_seqlens: Bounds of the sequences here.
            log_decay: Logarithm of the factor of each token, shape (B, C, N) or (B * C, N), where
                the last state is linear in the first.

        Returns:
            What `run` gives.
        """
        if initial is not None:
            raise RuntimeError("a sequence that is cut has no state here before it began")
        if log_decay is not None:
            return run(self.segments.to_sequences(self._scanned(run, log_decay)))
        before = None
        if self._ring.rank > 0:
            before = receive(self._state_shape, self._dtype, self._device, self._ring)
            before = self.segments.to_sequences(before)
        y, last = run(before)
        if self._ring.rank < self._ring.size - 1:
            after = self.segments.last_of_rows(last).to(self._dtype)
            y = hand_on(y, after, self._ring)
        return y, last

    def halo(
        self, x: Tensor, initial: Tensor | None, *, width: int, cu_seqlens: Tensor | None
    ) -> Tensor | None:
        """Find the inputs before the tokens that are here.

        Args:
            x: Inputs, shape (B, C, channels), or (B * C, channels) with `cu_seqlens`.
            initial: Has to be `None`.
            width: How many matter.
            cu_seqlens: Bounds of the sequences here.

        Returns:
            Shape (sequences, channels, width), the latest last, zeros before a sequence began.
        """
        if initial is not None:
            raise RuntimeError("a sequence that is cut has no inputs here before it began")
        if cu_seqlens is not None:
            x = x.unflatten(0, (self._state_shape[0], -1))
        B, C, channels = x.shape
        # Where a part is shorter than what matters, that of several processes is needed.
        length = min(width, C)
        ends = gather(x[:, -length:], self._group)
        # All stay in the graph: in the backward pass every process has to answer.
        known = torch.cat((x.new_zeros(B, width, channels), *ends), dim=1)
        halo = known[:, self._layout.rank * length :][:, :width]
        return self.segments.to_halo(halo.mT)

    def _scanned(self, run: Run, log_decay: Tensor) -> Tensor:
        """Compute the states before this process's rows from what all add to them.

        From rank to rank the state of a row is multiplied by a factor, and something is added. All
        do their part of the work at once, and each combines what those before it found.

        Source: Blelloch 1990, section 1.4, for the order; Dao and Gu 2024, section 6
        (arXiv:2405.21060), for factors of whole chunks.
        """
        added = self.segments.last_of_rows(run(None)[1]).to(self._dtype)
        factor = self.segments.factor_of_rows(log_decay.to(self._dtype))
        shape = factor.shape + (1,) * (added.ndim - factor.ndim)
        packed = torch.cat((added.flatten(2), factor.unsqueeze(-1)), dim=-1)
        found = gather(packed, self._group)
        # All stay in the graph: in the backward pass every process has to answer.
        found = torch.cat((torch.zeros_like(found[:1]), found))
        state = found[0, ..., :-1].unflatten(-1, added.shape[2:])
        for theirs in found[1 : self._layout.rank + 1]:
            more, kept = theirs[..., :-1], theirs[..., -1]
            state = state * kept.reshape(shape) + more.unflatten(-1, added.shape[2:])
        return state

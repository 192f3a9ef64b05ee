"""What recurrent mixers share: how tokens reach their ops, and a cache that does not grow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from lme_core.layers.context import SequenceContext
from lme_core.layers.settings import ModelSettings
from lme_core.mixers.base import LayerCache, SequenceMixer
from lme_core.mixers.short_convolution import Convolution
from lme_kernels.ops.pack_sequence import PACK_SEQUENCE
from lme_kernels.ops.unpack_sequence import UNPACK_SEQUENCE
from lme_kernels.policy import KernelPolicy

Run = Callable[[Tensor | None], tuple[Tensor, Tensor]]
"""Takes the states before the sequences, `None` for zeros; returns outputs and last states."""


class ExchangeState(Protocol):
    """Runs a recurrence on sequences whose beginnings may be elsewhere."""

    def __call__(
        self,
        run: Run,
        initial: Tensor | None,
        *,
        cu_seqlens: Tensor | None,
        log_decay: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence over the tokens that are here.

        Args:
            run: The recurrence over them, from given states.
            initial: States before the sequences as they are known here, shape (sequences, ...);
                `None` for zeros.
            cu_seqlens: Bounds of packed sequences; `None` where each row is one.
            log_decay: Where the last state is linear in the first, and each token multiplies that
                of head n by a factor: the factor's logarithm, shape (tokens..., N). `None` where
                only `run` can tell.

        Returns:
            What `run` gives from the states that are really before the sequences.
        """
        ...


class ExchangeHalo(Protocol):
    """Finds the inputs before sequences whose beginnings may be elsewhere."""

    def __call__(
        self, x: Tensor, initial: Tensor | None, *, width: int, cu_seqlens: Tensor | None
    ) -> Tensor | None:
        """Say what came before the tokens that are here.

        Args:
            x: Inputs of a convolution, shape (B, S, C), or (T, C) with `cu_seqlens`.
            initial: Inputs before the sequences as they are known here, shape
                (sequences, C, width), the latest last; `None` for zeros.
            width: How many matter.
            cu_seqlens: Bounds of packed sequences; `None` where each row is one.

        Returns:
            The inputs that are really before the sequences, shape (sequences, C, width), or `None`
            for zeros.
        """
        ...


def state_is_here(
    run: Run, initial: Tensor | None, *, cu_seqlens: Tensor | None, log_decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run whole sequences; see `ExchangeState`."""
    return run(initial)


def halo_is_here(
    x: Tensor, initial: Tensor | None, *, width: int, cu_seqlens: Tensor | None
) -> Tensor | None:
    """Convolve whole sequences; see `ExchangeHalo`."""
    return initial


def channels_are_here(x: Tensor) -> Tensor:
    """Return all channels where none are elsewhere; see `RecurrentMixer.gather_channels`."""
    return x


class Sequences(NamedTuple):
    """How the tokens of a call are handed to ops."""

    rows: int
    """Rows of the batch."""
    length: int
    """Tokens of a row."""
    cu_seqlens: Tensor | None
    """Bounds of packed sequences; `None` where each row is one."""
    padded: bool
    """Whether they are the rows without their padding."""

    # A method: torch 2.9 does not trace properties of tuples.
    def max_seqlen(self) -> int | None:
        """Tokens of the longest sequence at most; `None` where ops find it out themselves."""
        if self.cu_seqlens is None:
            return None
        # On a CPU it costs nothing to look, and spares steps; a compiler cannot look.
        if self.cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            return None
        return self.length

    def chunk_size(self, size: int) -> int:
        """Tokens that a recurrence by chunks multiplies at once.

        Args:
            size: As many as suit long sequences; a chunk longer than a row would be filled up.
        """
        return min(size, max(self.length, 1))


@dataclass(slots=True)
class RecurrentCache:
    """State after the tokens seen: as large after a thousand as after one."""

    state: Tensor | None = None
    """Shape (B, ...), in at least float32; `None` where the mixer has no state."""
    convolution: Tensor | None = None
    """Last inputs of the convolution, shape (B, C, width - 1); `None` where there is none."""

    def reorder(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` was."""
        if self.state is not None:
            self.state = self.state[rows]
        if self.convolution is not None:
            self.convolution = self.convolution[rows]


class RecurrentMixerConfig:
    """Answers that the configs of all recurrent mixers give."""

    __slots__ = ()

    def check(self, settings: ModelSettings) -> None:
        """Refuse what does not fit the architecture; nothing, unless a mixer says otherwise."""

    def has_dropout(self) -> bool:
        """Say whether anything is dropped in training."""
        return False

    def rotary_dim(self, settings: ModelSettings) -> int | None:
        """Channels that rotary positions turn: none."""
        return None


class RecurrentMixer(SequenceMixer):
    """Base of the mixers that carry a state along the sequence.

    Documents are kept apart and padding is left out before an op sees a token: where rows hold
    several documents, or are padded in generation, ops get packed tokens and their bounds.
    """

    shard_or_whole: ClassVar[bool] = True

    gather_channels: Callable[[Tensor], Tensor]
    """Puts the channels of all devices together, (..., C) to (..., all C), where heads are cut over
    them. Public so that it can be replaced."""
    state_heads_dim: ClassVar[int] = 0
    """Which dim of `state_shape` is that of the heads."""

    exchange_state: ExchangeState
    """Public so that sequences cut over devices can be served by another function."""
    exchange_halo: ExchangeHalo
    """Public for the same reason."""

    def __init__(self, kernels: KernelPolicy) -> None:
        """Bind what all need.

        Args:
            kernels: Which implementations run.
        """
        super().__init__()
        self.exchange_state = state_is_here
        self.exchange_halo = halo_is_here
        self.gather_channels = channels_are_here
        self.pack_sequence = kernels.bind(PACK_SEQUENCE)
        self.unpack_sequence = kernels.bind(UNPACK_SEQUENCE)
        self.convolution: Convolution | None = None
        self.state_shape: tuple[int, ...] | None = None

    def new_cache(
        self, batch_size: int, max_length: int, *, device: torch.device, dtype: torch.dtype
    ) -> RecurrentCache:
        """Make an empty cache; see `SequenceMixer`. Its size does not depend on `max_length`."""
        cache = RecurrentCache()
        if self.state_shape is not None:
            compute = torch.promote_types(dtype, torch.float32)
            cache.state = torch.zeros((batch_size, *self.state_shape), device=device, dtype=compute)
        if self.convolution is not None:
            channels, width = self.convolution.channels, self.convolution.width
            shape = (batch_size, channels, width - 1)
            cache.convolution = torch.zeros(shape, device=device, dtype=dtype)
        return cache

    def here(self, sizes: Sequence[int]) -> list[int]:
        """Say how much of each section of channels is on this device, where all are cut.

        Args:
            sizes: Lengths of the whole sections.
        """
        return [size // self.part[1] for size in sizes]

    def heads_here(self, x: Tensor, heads: int, *, serve: int) -> Tensor:
        """Turn a section's channels into those of its heads that the heads here need.

        Args:
            x: Channels that are here, shape (..., C).
            heads: Heads of the whole section, which divide `serve`: each serves neighbours.
            serve: Heads of the whole recurrence, a multiple of the number of devices.

        Returns:
            Shape (..., heads, channels of a head). Their number divides that of the recurrence's
            heads that are here.
        """
        parts = self.part[1]
        if heads % parts == 0:
            return x.unflatten(-1, (heads // parts, -1))
        # Devices that need the same head have parts of it.
        every = self.gather_channels(x).unflatten(-1, (heads, -1))
        return self.select_heads(every, serve=serve, dim=-2)

    def select_heads(self, every: Tensor, *, serve: int, dim: int) -> Tensor:
        """Take of all heads of one kind those that the recurrence's heads here need.

        Args:
            every: Has all heads of the kind on `dim`.
            serve: Heads of the whole recurrence, a multiple of the number of devices.
            dim: Which dim.

        Returns:
            As `every`, with as many heads on `dim` as `heads_here` says.
        """
        (rank, parts), heads = self.part, every.shape[dim]
        if heads % parts == 0 or parts % heads == 0:
            return every.narrow(dim, rank * heads // parts, max(heads // parts, 1))
        here = serve // parts
        spread = every.repeat_interleave(serve // heads, dim=dim)
        return spread.narrow(dim, rank * here, here)

    def sequences(self, x: Tensor, context: SequenceContext, cache: LayerCache | None) -> Sequences:
        """Say how the tokens of a call are handed to ops.

        Args:
            x: Shape (B, S, ...).
            context: Facts about the batch.
            cache: In generation; without it padding is on the right, after all that counts.

        Raises:
            ValueError: If packed documents come with a cache.
        """
        B, S = x.shape[:2]
        if cache is not None and context.cu_seqlens is not None:
            raise ValueError("`cu_seqlens` (packed documents) cannot be continued from a cache")
        if cache is None or context.valid is None:
            return Sequences(B, S, context.cu_seqlens, False)
        lengths = context.valid.sum(-1)
        return Sequences(B, S, torch.cat((lengths.new_zeros(1), lengths.cumsum(0))), True)

    def pack(self, x: Tensor, sequences: Sequences) -> Tensor:
        """Turn (B, S, C) into what ops take: itself, or (T, C)."""
        if sequences.cu_seqlens is None:
            return x
        if sequences.padded:
            return self.pack_sequence(x, sequences.cu_seqlens)
        return x.flatten(0, 1)

    def unpack(self, y: Tensor, sequences: Sequences) -> Tensor:
        """Undo `pack`: shape (B, S, C), zeros on padding."""
        if sequences.cu_seqlens is None:
            return y
        if not sequences.padded:
            return y.unflatten(0, (sequences.rows, sequences.length))
        return self.unpack_sequence(
            y, sequences.cu_seqlens, batch_size=sequences.rows, max_seqlen=sequences.length
        )

    def convolve(self, x: Tensor, sequences: Sequences, cache: LayerCache | None) -> Tensor:
        """Convolve along each sequence, after what came before it, if there is a convolution.

        Args:
            x: Shape (B, S, C), or (T, C) if packed.
            sequences: From `sequences`.
            cache: Its last inputs are read and replaced.

        Returns:
            The tokens of `x`, with the channels that the convolution gives.
        """
        if self.convolution is None:
            return x
        kept = None if cache is None else cast(RecurrentCache, cache)
        initial = self.exchange_halo(
            x,
            None if kept is None else kept.convolution,
            width=self.convolution.width - 1,
            cu_seqlens=sequences.cu_seqlens,
        )
        if kept is None:
            return self.convolution(x, initial, sequences.cu_seqlens)
        y, kept.convolution = self.convolution.step(x, initial, sequences.cu_seqlens)
        return y

    def recur(
        self,
        run: Run,
        sequences: Sequences,
        cache: LayerCache | None,
        log_decay: Tensor | None = None,
    ) -> Tensor:
        """Run the recurrence along each sequence, from the state before it.

        Args:
            run: See `ExchangeState`.
            sequences: From `sequences`.
            cache: Its state is read and replaced.
            log_decay: See `ExchangeState`.

        Returns:
            The outputs that `run` gives.
        """
        kept = None if cache is None else cast(RecurrentCache, cache)
        y, state = self.exchange_state(
            run,
            None if kept is None else kept.state,
            cu_seqlens=sequences.cu_seqlens,
            log_decay=log_decay,
        )
        if kept is not None:
            kept.state = state
        return y

"""What the recurrent ops have in common: their arguments, and sequences one time at a time."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lme_kernels.precision import compute_dtype


class ScanOptions(NamedTuple):
    """Options of a recurrence, in the order its implementations take them."""

    max_seqlen: int | None
    gradient_clipping: float | None

    def check(self) -> "ScanOptions":
        """Return itself if every option is in range.

        Raises:
            ValueError: If one is not.
        """
        if self.max_seqlen is not None and self.max_seqlen < 0:
            raise ValueError(f"`max_seqlen` must be at least 0 (or `None`), got {self.max_seqlen}")
        if self.gradient_clipping is not None and not self.gradient_clipping > 0:
            raise ValueError(
                "`gradient_clipping` must be above 0 (or `None` for no clipping), got "
                f"{self.gradient_clipping}"
            )
        return self


def check_inputs(inputs: Mapping[str, Tensor], cu_seqlens: Tensor | None, dims: int = 2) -> None:
    """Check that inputs have the same tokens, dtype and device.

    Args:
        inputs: Tensors by name, shape (B, S, ...), or (T, ...) with `cu_seqlens`.
        cu_seqlens: Starts of packed sequences.
        dims: Dimensions after the tokens.

    Raises:
        ValueError: If they do not.
    """
    leading = 2 if cu_seqlens is None else 1
    names = list(inputs)
    first = inputs[names[0]]
    tokens = "(B, S," if cu_seqlens is None else "(T,"
    for name, tensor in inputs.items():
        if tensor.ndim < leading + 1 or tensor.shape[:leading] != first.shape[:leading]:
            raise ValueError(
                f"`{name}` must have shape {tokens} ...) with the tokens of `{names[0]}`, got "
                f"{tuple(tensor.shape)} and {tuple(first.shape)}; `cu_seqlens` goes with packed "
                "tokens and with nothing else"
            )
        if tensor.dtype != first.dtype or not tensor.is_floating_point():
            raise ValueError(
                f"`{name}` must have the floating-point dtype of `{names[0]}`, got {tensor.dtype} "
                f"and {first.dtype}"
            )
    if first.ndim != leading + dims:
        raise ValueError(
            f"`{names[0]}` must have {leading + dims} dimensions, got shape {tuple(first.shape)}"
        )
    if cu_seqlens is not None and (
        cu_seqlens.ndim != 1
        or cu_seqlens.shape[0] == 0
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            "`cu_seqlens` must have shape (sequences + 1,) and dtype int32 or int64, got "
            f"{tuple(cu_seqlens.shape)} and {cu_seqlens.dtype}"
        )


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | str], dtype: torch.dtype) -> None:
    """Check a shape, of which names stand for any size, and a dtype.

    Raises:
        ValueError: If either differs.
    """
    fits = tensor.ndim == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(each) for each in shape)
        raise ValueError(f"`{name}` must have shape ({wanted}), got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"`{name}` must have dtype {dtype}, as the input, got {tensor.dtype}")


def common_heads(counts: Mapping[str, int]) -> int:
    """Return the largest number of heads; every tensor's own must divide it.

    Args:
        counts: Numbers of heads by name of the tensor.

    Returns:
        The number of heads of the recurrence.

    Raises:
        ValueError: If one does not divide the largest.
    """
    N = max(counts.values())
    for name, count in counts.items():
        if count == 0 or N % count:
            raise ValueError(f"`{name}` has {count} heads, which do not divide the largest, {N}")
    return N


def check_state(name: str, state: Tensor | None, shape: tuple[int, ...]) -> None:
    """Check an initial state.

    Raises:
        ValueError: If it has another shape or an integer dtype.
    """
    if state is not None and (state.shape != shape or not state.is_floating_point()):
        raise ValueError(
            f"`{name}` must be floating-point and have shape {shape}, got {state.dtype} and "
            f"{tuple(state.shape)}"
        )


def num_sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Count the sequences of inputs of shape (B, S, ...), or (T, ...) with `cu_seqlens`."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


class Steps:
    """The tokens of a call by time, for references: sequences side by side, padded if packed.

    Where `cu_seqlens` is given and `max_seqlen` is not, the longest length is read from the device.
    """

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> None:
        self._cu_seqlens = cu_seqlens
        self._compute = compute_dtype(x.dtype)
        self._dtype = x.dtype
        if cu_seqlens is None:
            self.length = x.shape[1]
            return
        self._T = x.shape[0]
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        if max_seqlen is None:
            max_seqlen = int((ends - starts).max()) if len(starts) > 0 else 0
        self.length = max_seqlen
        times = torch.arange(max_seqlen, device=x.device)
        # Times past the end of a sequence read some token and are dropped by `keep`.
        self._index = (starts + times[:, None]).clamp(max=max(self._T - 1, 0))
        self._live = times[:, None] < ends - starts

    def split(self, x: Tensor, N: int) -> list[Tensor]:
        """List the inputs of each time, shape (N, sequences, ...), to compute with.

        Args:
            x: Shape (B, S, heads, ...), or (T, heads, ...) if packed; heads divide `N`.
            N: Number of heads of the recurrence.
        """
        x = x.to(self._compute)
        if self._cu_seqlens is None:
            by_time = x.transpose(0, 1)
        elif self._T == 0:
            by_time = x.new_zeros((*self._index.shape, *x.shape[1:]))
        else:
            by_time = x[self._index]
        return list(by_time.transpose(1, 2).repeat_interleave(N // x.shape[-2], 1).unbind(0))

    def keep(self, t: int, new: Tensor, old: Tensor) -> Tensor:
        """Take `new` for the sequences that have a time `t`; shapes (N, sequences, ...)."""
        if self._cu_seqlens is None:
            return new
        live = self._live[t].view(1, -1, *(1 for _ in new.shape[2:]))
        return torch.where(live, new, old)

    def merge(self, outputs: list[Tensor], like: Tensor) -> Tensor:
        """Undo `split`: shape (B, S, N, ...), or (T, N, ...) if packed, dtype of the inputs.

        Args:
            outputs: One a time, shape (N, sequences, ...).
            like: A state of that shape, for calls without a time.
        """
        if outputs:
            by_time = torch.stack(outputs).transpose(1, 2)
        else:
            by_time = like.new_zeros((0, *like.shape)).transpose(1, 2)
        if self._cu_seqlens is None:
            return by_time.transpose(0, 1).to(self._dtype).contiguous()
        tokens = torch.arange(self._T, device=like.device)
        # The last sequence that starts at or before a token holds it: the empty ones come before.
        owner = torch.searchsorted(self._cu_seqlens.long(), tokens, right=True) - 1
        return by_time[tokens - self._cu_seqlens.long()[owner], owner].to(self._dtype)


def first_state(
    state: Tensor | None, N: int, sequences: int, size: tuple[int, ...], x: Tensor
) -> Tensor:
    """Return the state to start from, shape (N, sequences, *size), in the dtype to compute in."""
    if state is None:
        return torch.zeros((N, sequences, *size), dtype=compute_dtype(x.dtype), device=x.device)
    return state.to(compute_dtype(x.dtype)).transpose(0, 1)


def last_state(state: Tensor, initial: Tensor | None, x: Tensor) -> Tensor:
    """Return the final state, shape (sequences, N, ...), in the dtype of the initial one or `x`."""
    dtype = x.dtype if initial is None else initial.dtype
    return state.transpose(0, 1).to(dtype).contiguous()


def spread(weight: Tensor, N: int, x: Tensor) -> Tensor:
    """Return the weights of each of `N` heads in the dtype to compute in."""
    return weight.to(compute_dtype(x.dtype)).repeat_interleave(N // weight.shape[0], 0)


def clip_gradient(state: Tensor, bound: float | None) -> Tensor:
    """Return `state`, whose gradient is clamped to `[-bound, bound]` by the backward."""
    return state if bound is None else _ClipGradient.apply(state, bound)


class _ClipGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, state, bound):
        ctx.bound = bound
        return state.view_as(state)

    @staticmethod
    def backward(ctx, *grads):
        return grads[0].clamp(-ctx.bound, ctx.bound), None

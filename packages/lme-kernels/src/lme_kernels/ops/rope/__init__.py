"""Rotary position embedding of queries and keys."""

from typing import Literal

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.rope import reference

ROPE = Op(
    name="rope",
    reference=reference.rope,
    implementations={Backend.TRITON: "lme_kernels.ops.rope._triton"},
    traced=True,
)

Channels = Literal["last", "first"]


def rope(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    channels: Channels = "last",
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate pairs of channels of queries and keys by angles that grow with the position.

    Channel i of the first half of the rotated channels pairs with channel i of the second half.

    Args:
        query: Shape (B, S, N, D).
        key: Shape (B, S, K, D), dtype of `query`.
        cos: Cosines of the angles, shape (S, R) or (B, S, R), the second half a copy of the first;
            R is even and at most D. Its gradient is not computed.
        sin: Sines, shape and dtype of `cos`.
        channels: Which R of the D channels rotate, the "last" or the "first"; others pass through.
        backend: Implementation to run; `None` takes the fastest one proven for `query`'s device.

    Returns:
        Rotated `query` and `key`, shapes and dtypes as given; computed in at least float32 and
        rounded once.

    Raises:
        ValueError: If the shapes do not fit or there is no such choice of channels.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Su et al. 2021, equation 34 (arXiv:2104.09864), in the half-split order of channels.
    """
    check_rotation(query, key, cos, sin, channels)
    return ROPE.choose(backend, query, key, cos, sin)(query, key, cos, sin, channels)


def check_rotation(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, channels: str) -> None:
    """Check the arguments that `rope` and `qk_norm_rope` share.

    Raises:
        ValueError: If the shapes do not fit or there is no such choice of channels.
    """
    if channels not in ("last", "first"):
        raise ValueError(f'`channels` must be "last" or "first", got {channels!r}')
    if query.ndim != 4 or key.ndim != 4 or _outer(query) != _outer(key):
        raise ValueError(
            f"`query` and `key` must have shapes (B, S, N, D) and (B, S, K, D), got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    B, S, D = _outer(query)
    R = cos.shape[-1]
    if tuple(cos.shape) not in ((S, R), (B, S, R)) or cos.shape != sin.shape:
        raise ValueError(
            f"`cos` and `sin` must have shape {(S, R)} or {(B, S, R)}, got {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )
    if R % 2 or R > D:
        raise ValueError(f"`cos` must have an even number of at most {D} channels, got {R}")


def _outer(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[3]

"""Normalisation of each head of queries and keys, and their rotary embedding, in one pass."""

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.qk_norm_rope import reference
from lme_kernels.ops.rope import Channels, check_rotation

QK_NORM_ROPE = Op(
    name="qk_norm_rope",
    reference=reference.qk_norm_rope,
    implementations={Backend.TRITON: "lme_kernels.ops.qk_norm_rope._triton"},
)


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    channels: Channels = "last",
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Divide each head by its root mean square, scale it, and rotate it by its position.

    Args:
        query: Shape (B, S, N, D).
        key: Shape (B, S, K, D), dtype of `query`.
        query_weight: Scale of every query head, shape (D,); `None` for no scale.
        key_weight: Scale of every key head, shape (D,); `None` for no scale.
        cos: Cosines of the angles, shape (S, R) or (B, S, R), the second half a copy of the first;
            R is even and at most D. Its gradient is not computed.
        sin: Sines, shape and dtype of `cos`.
        eps: Added to the mean square, in units of `query` squared.
        channels: Which R of the D channels rotate, the "last" or the "first".
        backend: Implementation to run; `None` takes the fastest one proven for `query`'s device.

    Returns:
        Normalised and rotated `query` and `key`, shapes and dtypes as given; computed in at least
        float32 and rounded once, after the rotation.

    Raises:
        ValueError: If the shapes do not fit or there is no such choice of channels.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Henry et al. 2020 (arXiv:2010.04245) with root mean squares, then Su et al. 2021,
    equation 34 (arXiv:2104.09864).
    """
    check_rotation(query, key, cos, sin, channels)
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight is not None and weight.shape != query.shape[-1:]:
            expected, got = tuple(query.shape[-1:]), tuple(weight.shape)
            raise ValueError(f"`{name}` must have shape {expected} to match `query`, got {got}")
    function = QK_NORM_ROPE.choose(backend, query, key, query_weight, key_weight, cos, sin)
    return function(query, key, query_weight, key_weight, cos, sin, eps, channels)

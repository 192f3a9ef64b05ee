"""Choice of experts for tokens."""

from typing import Literal

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.router_topk import reference

ROUTER_TOPK = Op(
    name="router_topk",
    reference=reference.router_topk,
    implementations={Backend.TRITON: "lme_kernels.ops.router_topk._triton"},
)

Score = Literal["softmax", "sigmoid"]


def router_topk(
    logits: Tensor,
    k: int,
    *,
    score: Score = "softmax",
    normalize: bool = True,
    bias: Tensor | None = None,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose `k` experts for each token, and weigh them.

    Args:
        logits: The router's outputs, shape (..., E).
        k: Number of experts a token.
        score: What a logit becomes: "softmax" its share among all experts, "sigmoid" its sigmoid.
        normalize: Whether the weights of a token add up to one: with "softmax" that is the softmax
            of the chosen logits, with "sigmoid" scores over their sum. Else weights are scores.
        bias: Shape (E,); added to the scores to choose experts, not to weigh them, and gets no
            gradient: it balances the experts' load without a loss. `None` for none.
        backend: Implementation to run; `None` takes the fastest one proven for `logits`' device.

    Returns:
        Weights, shape (..., k), dtype of `logits`, the highest choice first; and the experts,
        shape (..., k), int64. Of equal scores the expert with the lower number comes first.
        Gradients go through the weights. Computed in at least float32.

    Raises:
        ValueError: If `k` is not between 1 and E, there is no such score, or `bias` does not have
            shape (E,).
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Shazeer et al. 2017, equations 3 to 5, without noise (arXiv:1701.06538); the bias is
    Wang et al. 2024, equation 3 (arXiv:2408.15664).
    """
    E = logits.shape[-1]
    if not 1 <= k <= E:
        raise ValueError(f"`k` must be between 1 and the {E} experts of `logits`, got {k}")
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f'`score` must be "softmax" or "sigmoid", got {score!r}')
    if bias is not None and bias.shape != (E,):
        raise ValueError(
            f"`bias` must have shape ({E},) to match `logits`, got {tuple(bias.shape)}"
        )
    if bias is not None:
        bias = bias.detach()
    return ROUTER_TOPK.choose(backend, logits, bias)(logits, k, score, normalize, bias)

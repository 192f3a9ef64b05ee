"""Choice of experts in plain torch."""

from torch import Tensor

from lme_kernels.precision import compute_dtype

# Keeps the weights of a token finite where all its sigmoids are zero.
TINY = 1e-20


def router_topk(
    logits: Tensor, k: int, score: str, normalize: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = logits.to(compute_dtype(logits.dtype))
    scores = x.softmax(dim=-1) if score == "softmax" else x.sigmoid()
    # Scores rise with logits, which are exact.
    rank_by = x if bias is None else scores + bias.to(x.dtype)
    # Unlike a top-k, a stable sort says who comes first among equals.
    indices = rank_by.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    if score == "softmax" and normalize:
        weights = x.gather(-1, indices).softmax(dim=-1)
    else:
        weights = scores.gather(-1, indices)
        if normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
    return weights.to(logits.dtype), indices.contiguous()

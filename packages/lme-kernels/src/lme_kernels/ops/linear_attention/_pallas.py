"""Linear attention with decay in Pallas, for tensors on XLA devices."""

from torch import Tensor

from lme_kernels import pallas
from lme_kernels._pallas_torch import call, why_not
from lme_kernels.ops.linear_attention.arguments import ChunkOptions

__all__ = ["linear_attention", "why_not"]


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    options: ChunkOptions,
) -> tuple[Tensor, Tensor]:
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "log_decay": log_decay,
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
    }
    y, state = call(pallas.linear_attention, tensors, return_final_state=True, **options._asdict())
    return y, state

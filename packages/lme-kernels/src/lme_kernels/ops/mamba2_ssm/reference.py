"""The state space model of Mamba 2 in plain torch: linear attention whose decay is a step's."""

from torch import Tensor

from lme_kernels.ops.linear_attention.arguments import ChunkOptions, final_dtype
from lme_kernels.ops.linear_attention.reference import attend
from lme_kernels.precision import compute_dtype


def mamba2_ssm(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    options: ChunkOptions,
) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(x.dtype)
    x_compute, step = x.to(compute), dt.to(compute)
    initial = None if initial_state is None else initial_state.mT
    y, state = attend(
        C.to(compute),
        B.to(compute),
        x_compute * step.unsqueeze(-1),
        step * A.to(compute),
        initial,
        cu_seqlens,
        options,
    )
    if D is not None:
        y = y + D.to(compute).unsqueeze(-1) * x_compute
    return y.to(x.dtype), state.mT.to(final_dtype(x, initial_state)).contiguous()

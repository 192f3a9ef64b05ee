"""The state space model of Mamba 2 by the Triton kernels of `linear_attention`.

Steps multiply keys inside the kernels, groups are read where they are, and the skip is added where
outputs are written; steps times rates, one number a token and head, are plain torch.
"""

import torch
from torch import Tensor

from lme_kernels.ops.linear_attention._triton import attend, why_not_channels
from lme_kernels.ops.linear_attention.arguments import ChunkOptions


def why_not(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
) -> str | None:
    return why_not_channels(C, x, dt, A, B, D, initial_state)


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
    step = dt.to(torch.float32)
    y, state = attend(
        C,
        B,
        x,
        step * A.to(torch.float32),
        step,
        D,
        None if initial_state is None else initial_state.mT,
        cu_seqlens,
        1.0,
        True,
    )
    return y, state.mT.contiguous()

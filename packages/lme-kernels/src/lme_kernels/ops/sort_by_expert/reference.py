"""Order of entries by expert in plain torch."""

import torch
from torch import Tensor

from lme_kernels.ops.continuous_count.reference import continuous_count


def sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    experts = indices.reshape(-1).clamp(0, num_experts - 1)
    order = torch.argsort(experts, stable=True).int()
    offsets = continuous_count(experts, num_experts).cumsum(0, dtype=torch.int32)
    places = torch.arange(order.shape[0], dtype=torch.int32, device=order.device)
    return order, offsets, torch.empty_like(order).scatter(0, order.long(), places)

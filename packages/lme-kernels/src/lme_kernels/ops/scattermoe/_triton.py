"""Mixture of experts on sorted rows: gather, product, activation, product, combine."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels.device import why_not_triton
from lme_kernels.ops.scattermoe import _triton_stages as stages
from lme_kernels.ops.scattermoe.activations import Activation
from lme_kernels.ops.scattermoe.plan import Plan, current_plan
from lme_kernels.ops.sort_by_expert._triton import sort_by_expert

MAX_EXPERTS = 4096


def why_not(
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> str | None:
    if up.shape[0] > MAX_EXPERTS:
        return f"there are {up.shape[0]} experts, and it takes at most {MAX_EXPERTS}"
    if 0 in up.shape or 0 in down.shape:
        return "the experts have no weights"
    return why_not_triton(x, weights, up, down, up_bias, down_bias)


def scattermoe(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    order, offsets, position = sort_by_expert(indices, up.shape[0])
    plan = _served(current_plan(), x, up, down, up_bias, down_bias)
    sorting = (indices, order, offsets, position)
    return _ScatterMoE.apply(x, weights, up, down, up_bias, down_bias, *sorting, activation, plan)


def _served(
    plan: Plan,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Plan:
    """The plan, all in Triton where `grouped_mm` cannot serve: it wants rows of whole 16 bytes."""
    sizes = (*up.shape[1:], *down.shape[1:])
    served = x.is_cuda and x.dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes)
    if served and up_bias is None and down_bias is None:
        return plan
    return Plan(False, False, False, False, False)


class _ScatterMoE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        weights,
        up,
        down,
        up_bias,
        down_bias,
        indices,
        order,
        offsets,
        position,
        activation,
        plan,
    ):
        x, weights, up, down = (each.contiguous() for each in (x, weights, up, down))
        up_bias, down_bias = (
            None if each is None else each.contiguous() for each in (up_bias, down_bias)
        )
        top_k = weights.shape[1]
        kind = (activation.function, activation.gated, top_k)
        h, y = stages.up_stage(x, order, offsets, up, up_bias, *kind, plan.up)
        y = stages.down_stage(y, order, offsets, down, down_bias, plan.down)
        ctx.save_for_backward(
            x, weights, up, down, up_bias, down_bias, indices, order, offsets, position, h
        )
        ctx.kind, ctx.plan = kind, plan
        return stages.combine(y, weights, position, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weights, up, down, up_bias, down_bias, indices, order, offsets, position, h = (
            ctx.saved_tensors
        )
        plan, top_k = ctx.plan, ctx.kind[2]
        grad = grad.contiguous()
        grad_h, weighted, grad_weights, gathered = stages.down_grad_stage(
            grad, order, offsets, down, h, weights, *ctx.kind, plan.down_grad
        )
        grad_weights = grad_weights.view(weights.shape)
        grad_x = grad_up = grad_down = grad_up_bias = grad_down_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = stages.up_grad_stage(grad_h, order, offsets, up, plan.up_grad)
            grad_x = stages.combine(grad_x, None, position, top_k)
        sorting = (order, offsets)
        if ctx.needs_input_grad[2]:
            grad_up = stages.weight_grad_stage(
                grad_h, x, *sorting, False, True, top_k, plan.weight_grad
            )
        if ctx.needs_input_grad[3]:
            # Rows that a stage before gathered are not gathered again.
            ready = plan.weight_grad and plan.down_grad
            grad_down = stages.weight_grad_stage(
                gathered if ready else grad,
                weighted,
                *sorting,
                not ready,
                False,
                top_k,
                plan.weight_grad,
            )
        if ctx.needs_input_grad[4]:
            grad_up_bias = stages.add_up(grad_h, None, *sorting, top_k).to(up_bias.dtype)
        if down_bias is not None:
            if ctx.needs_input_grad[5]:
                grad_down_bias = stages.add_up(grad, weights, *sorting, top_k)
            # What the biases of a token's experts add to the gradients of its weights.
            along = grad.float() @ down_bias.float().t()
            grad_weights = grad_weights + along.gather(1, indices.long())
        grads = (grad_x, grad_weights.to(weights.dtype), grad_up, grad_down)
        return *grads, grad_up_bias, grad_down_bias, *(None,) * 6

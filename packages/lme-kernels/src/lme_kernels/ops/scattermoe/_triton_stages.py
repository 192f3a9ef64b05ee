"""Stages of a mixture of experts: each a product by Triton or `grouped_mm`, or a pass over rows."""

import torch
import triton
from torch import Tensor

from lme_kernels.custom_ops import define
from lme_kernels.ops.scattermoe._triton_products import (
    ACTIVATE,
    DIFFERENTIATE,
    PLAIN,
    product_kernel,
    weight_gradient_kernel,
)
from lme_kernels.ops.scattermoe._triton_sorted import (
    activate_kernel,
    add_up_kernel,
    combine_kernel,
    differentiate_kernel,
    gather_kernel,
)
from lme_kernels.ops.scattermoe.plan import Tiles, tiles_of
from lme_kernels.tuning import next_power_of_two

# Rows of tiles that are worked on together.
GROUP = 8


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Torch's grouped product, under whichever name this version has it."""
    if hasattr(torch.nn.functional, "grouped_mm"):
        return torch.nn.functional.grouped_mm(a, b, offs=offsets)
    return torch._grouped_mm(a, b, offs=offsets)


def _tiles(stage: str, x: Tensor, rows: int, experts: int) -> Tiles:
    if not x.is_cuda:
        # Under the interpreter: small, so that small examples have several tiles.
        return Tiles(16, 32, 16, 4, 2)
    small = torch.cuda.get_device_capability(x.device)[0] < 9
    return tiles_of(stage, x.dtype, rows // max(experts, 1), small)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _launch_product(stage, a, b, c, order, offsets, *, top_k, gather, k_last, epilogue, **rest):
    """Launch the product kernel for `c`'s rows; what its epilogue takes is in `rest`."""
    rows, E = order.shape[0], b.shape[0]
    N, K = b.shape[1:] if k_last else (b.shape[2], b.shape[1])
    tiles = _tiles(stage, a, rows, E)
    # The most tiles that any division of the rows among the experts makes.
    tiles_m = rows // tiles.rows + min(E, rows)
    product_kernel[(tiles_m * triton.cdiv(N, tiles.columns),)](
        a,
        b,
        c,
        order,
        offsets,
        rest.get("bias"),
        rest.get("activated"),
        rest.get("pre"),
        rest.get("weights"),
        rest.get("partial"),
        tiles_m,
        rows,
        E,
        N,
        K,
        top_k,
        GATHER=gather,
        K_LAST=k_last,
        EPILOGUE=epilogue,
        HAS_BIAS=rest.get("bias") is not None,
        FUNCTION=rest.get("function", ""),
        GATED=rest.get("gated", False),
        EVEN_K=K % tiles.depth == 0,
        PRECISION=_precision(a),
        BLOCK_EXPERTS=max(16, next_power_of_two(E)),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        GROUP=GROUP,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _row_blocks(rows, width):
    block = min(1024, max(16, next_power_of_two(width)))
    return (rows, triton.cdiv(width, block)), {"BLOCK": block, "num_warps": max(1, block // 256)}


def _gather_fake(x, order, top_k):
    return x.new_empty((order.shape[0], x.shape[1]))


@define("moe_gather(Tensor x, Tensor order, int top_k) -> Tensor", _gather_fake)
def gather(x, order, top_k):
    """Rows of the tokens in sorted order."""
    y = _gather_fake(x, order, top_k)
    if y.numel():
        grid, settings = _row_blocks(*y.shape)
        gather_kernel[grid](x, order, y, x.shape[1], top_k, **settings)
    return y


def _up_fake(x, order, offsets, up, bias, function, gated, top_k, grouped):
    rows, U = order.shape[0], up.shape[1]
    return x.new_empty((rows, U)), x.new_empty((rows, U // 2 if gated else U))


@define(
    "moe_up(Tensor x, Tensor order, Tensor offsets, Tensor up, Tensor? bias, str function, "
    "bool gated, int top_k, bool grouped) -> (Tensor, Tensor)",
    _up_fake,
)
def up_stage(x, order, offsets, up, bias, function, gated, top_k, grouped):
    """Pre-activations and activations of the sorted rows."""
    h, y = _up_fake(x, order, offsets, up, bias, function, gated, top_k, grouped)
    if y.numel() == 0:
        return h, y
    if grouped:
        h = grouped_mm(gather(x, order, top_k), up.transpose(1, 2), offsets)
        grid, settings = _row_blocks(*y.shape)
        activate_kernel[grid](h, y, y.shape[1], FUNCTION=function, GATED=gated, **settings)
        return h, y
    _launch_product(
        "product",
        x,
        up,
        h,
        order,
        offsets,
        top_k=top_k,
        gather=True,
        k_last=True,
        epilogue=ACTIVATE,
        bias=bias,
        activated=y,
        function=function,
        gated=gated,
    )
    return h, y


def _down_fake(y, order, offsets, down, bias, grouped):
    return y.new_empty((y.shape[0], down.shape[1]))


@define(
    "moe_down(Tensor y, Tensor order, Tensor offsets, Tensor down, Tensor? bias, bool grouped) -> "
    "Tensor",
    _down_fake,
)
def down_stage(y, order, offsets, down, bias, grouped):
    """Outputs of the experts for the sorted rows."""
    out = _down_fake(y, order, offsets, down, bias, grouped)
    if out.numel() == 0:
        return out
    if grouped:
        return grouped_mm(y, down.transpose(1, 2), offsets)
    _launch_product(
        "product",
        y,
        down,
        out,
        order,
        offsets,
        top_k=1,
        gather=False,
        k_last=True,
        epilogue=PLAIN,
        bias=bias,
    )
    return out


def _combine_fake(y, weights, position, top_k):
    return y.new_empty((position.shape[0] // top_k, y.shape[1]))


@define(
    "moe_combine(Tensor y, Tensor? weights, Tensor position, int top_k) -> Tensor", _combine_fake
)
def combine(y, weights, position, top_k):
    """Sum of each token's rows, times its weights if there are any."""
    out = _combine_fake(y, weights, position, top_k)
    if out.numel():
        grid, settings = _row_blocks(*out.shape)
        combine_kernel[grid](
            y, weights, position, out, y.shape[1], K=top_k, WEIGHTED=weights is not None, **settings
        )
    return out


def _down_grad_fake(grad, order, offsets, down, h, weights, function, gated, top_k, grouped):
    rows, width = order.shape[0], down.shape[2]
    gathered = grad.new_empty((rows if grouped else 0, grad.shape[1]))
    grad_weights = grad.new_empty(rows, dtype=torch.float32)
    return h.new_empty(h.shape), h.new_empty((rows, width)), grad_weights, gathered


@define(
    "moe_down_grad(Tensor grad, Tensor order, Tensor offsets, Tensor down, Tensor h, "
    "Tensor weights, str function, bool gated, int top_k, bool grouped) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _down_grad_fake,
)
def down_grad_stage(grad, order, offsets, down, h, weights, function, gated, top_k, grouped):
    """Gradient of pre-activations, weighted activations, gradient of each choice's weight.

    The last result is the gathered gradient of the output where `grouped` needs it, else empty.
    """
    results = _down_grad_fake(
        grad, order, offsets, down, h, weights, function, gated, top_k, grouped
    )
    grad_h, weighted, grad_weights, gathered = results
    if order.shape[0] == 0:
        return results
    rows, width = weighted.shape
    if grouped:
        gathered = gather(grad, order, top_k)
        grad_y = grouped_mm(gathered, down, offsets)
        block = min(1024, max(16, next_power_of_two(width)))
        differentiate_kernel[(rows,)](
            grad_y,
            h,
            weights,
            order,
            grad_h,
            weighted,
            grad_weights,
            width,
            FUNCTION=function,
            GATED=gated,
            BLOCK=block,
            num_warps=max(1, block // 256),
        )
        return grad_h, weighted, grad_weights, gathered
    columns = _tiles("down_grad", grad, rows, down.shape[0]).columns
    shape = (triton.cdiv(width, columns), rows)
    partial = torch.empty(shape, dtype=torch.float32, device=grad.device)
    _launch_product(
        "down_grad",
        grad,
        down,
        grad_h,
        order,
        offsets,
        top_k=top_k,
        gather=True,
        k_last=False,
        epilogue=DIFFERENTIATE,
        activated=weighted,
        pre=h,
        weights=weights,
        partial=partial,
        function=function,
        gated=gated,
    )
    return grad_h, weighted, partial.sum(0), gathered


def _up_grad_fake(grad_h, order, offsets, up, grouped):
    return grad_h.new_empty((grad_h.shape[0], up.shape[2]))


@define(
    "moe_up_grad(Tensor grad_h, Tensor order, Tensor offsets, Tensor up, bool grouped) -> Tensor",
    _up_grad_fake,
)
def up_grad_stage(grad_h, order, offsets, up, grouped):
    """Gradient of the gathered tokens."""
    grad_x = _up_grad_fake(grad_h, order, offsets, up, grouped)
    if grad_x.numel() == 0:
        return grad_x
    if grouped:
        return grouped_mm(grad_h, up, offsets)
    _launch_product(
        "product",
        grad_h,
        up,
        grad_x,
        order,
        offsets,
        top_k=1,
        gather=False,
        k_last=False,
        epilogue=PLAIN,
    )
    return grad_x


def _weight_grad_fake(left, right, order, offsets, gather_left, gather_right, top_k, grouped):
    return left.new_empty((offsets.shape[0], left.shape[1], right.shape[1]))


@define(
    "moe_weight_grad(Tensor left, Tensor right, Tensor order, Tensor offsets, bool gather_left, "
    "bool gather_right, int top_k, bool grouped) -> Tensor",
    _weight_grad_fake,
)
def weight_grad_stage(left, right, order, offsets, gather_left, gather_right, top_k, grouped):
    """Product of an expert's rows of `left`, transposed, and of `right`, of each expert."""
    out = _weight_grad_fake(left, right, order, offsets, gather_left, gather_right, top_k, grouped)
    if order.shape[0] == 0:
        return out.zero_()
    if grouped:
        left = gather(left, order, top_k) if gather_left else left
        right = gather(right, order, top_k) if gather_right else right
        return grouped_mm(left.t(), right, offsets)
    E, M, N = out.shape
    tiles = _tiles("weight", left, order.shape[0], E)
    grid = (triton.cdiv(M, tiles.rows) * triton.cdiv(N, tiles.columns), E)
    weight_gradient_kernel[grid](
        left,
        right,
        out,
        order,
        offsets,
        M,
        N,
        top_k,
        GATHER_LEFT=gather_left,
        GATHER_RIGHT=gather_right,
        PRECISION=_precision(left),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        GROUP=GROUP,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out


def _add_up_fake(x, weights, order, offsets, top_k):
    return x.new_empty((offsets.shape[0], x.shape[1]))


@define(
    "moe_add_up(Tensor x, Tensor? weights, Tensor order, Tensor offsets, int top_k) -> Tensor",
    _add_up_fake,
)
def add_up(x, weights, order, offsets, top_k):
    """Sum of each expert's sorted rows; with weights, of its tokens' rows times the weights."""
    total = _add_up_fake(x, weights, order, offsets, top_k)
    E, width = total.shape
    if order.shape[0] == 0:
        return total.zero_()
    gathered = weights is not None
    add_up_kernel[(E, triton.cdiv(width, 64))](
        x, weights, order, offsets, total, width, top_k, GATHER=gathered, ROWS=32, BLOCK=64
    )
    return total

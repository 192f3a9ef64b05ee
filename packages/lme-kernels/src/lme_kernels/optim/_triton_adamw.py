"""AdamW over a table of tensors in Triton: each element is read once and written once."""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lme_kernels._triton_launch import thin_launch
from lme_kernels.device import TRITON_DTYPES
from lme_kernels.optim._triton_tables import TL_DTYPES, address, chunk_of_program, write_numbers
from lme_kernels.optim.batch import AdamWBatch, AdamWSettings
from lme_kernels.optim.philox import BLOCK
from lme_kernels.optim.tables import CHUNK, make_table
from lme_kernels.tuning import ceil_div


def why_not(parameter: Tensor, grad: Tensor, exp_avg: Tensor) -> str | None:
    """Say why the kernels cannot update `parameter`."""
    for each in (parameter, grad):
        if each.dtype not in TRITON_DTYPES:
            return f"{each.dtype} is not among float32, float16 and bfloat16"
    if exp_avg.dtype != torch.float32:
        return f"the means are {exp_avg.dtype}, and it takes float32"
    if not parameter.is_contiguous():
        return "the parameter is not contiguous"
    return None


@thin_launch
@triton.jit(do_not_specialize=["tensors"])
def _count_kernel(table_ptr, found_inf_ptr, tensors, HAS_FOUND: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < tensors
    step_ptr = tl.load(table_ptr + 6 * tensors + index, mask=mask, other=0)
    step_ptr = step_ptr.to(tl.pointer_type(tl.float32))
    added = 1.0
    if HAS_FOUND:
        added = tl.where(tl.load(found_inf_ptr) == 0, 1.0, 0.0)
    tl.store(step_ptr, tl.load(step_ptr, mask=mask, other=0.0) + added, mask=mask)


@triton.jit
def _round_stochastically(value, bits):
    word = value.to(tl.uint32, bitcast=True)
    moved = (word + (bits.to(tl.uint32) & 0xFFFF)) & 0xFFFF0000
    is_finite = (word & 0x7F800000) != 0x7F800000
    return tl.where(is_finite, moved, word).to(tl.float32, bitcast=True)


@triton.jit
def _word(part: tl.constexpr, r0, r1, r2, r3):
    return r0 if part == 0 else (r1 if part == 1 else (r2 if part == 2 else r3))


@triton.jit
def _load(pointer, offset, count, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(pointer + offset, mask=offset < count, other=0.0)
    else:
        x = tl.load(pointer + offset)
    return x.to(tl.float32)


@triton.jit
def _store(pointer, offset, count, x, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + offset, x, mask=offset < count)
    else:
        tl.store(pointer + offset, x)


@triton.jit
def _random_words(begin, start, seed, key, step, BLOCK: tl.constexpr):
    """Four words for each lane; part p of the block takes word p: `philox.element_bits`."""
    counter = (start + begin) // 4 + tl.arange(0, BLOCK)
    same = tl.zeros((BLOCK,), dtype=tl.uint32)
    return tl.philox(
        tl.cast(seed, tl.int64),
        (counter & 0xFFFFFFFF).to(tl.uint32),
        (counter >> 32).to(tl.uint32),
        key + same,
        step.to(tl.int64).to(tl.uint32) + same,
    )


@triton.jit
def _update(
    parameter_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, begin, count, start, seed, key,
    step, factor, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size,
    bias_correction2_sqrt, PARAMETER: tl.constexpr, STOCHASTIC: tl.constexpr,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if STOCHASTIC:
        r0, r1, r2, r3 = _random_words(begin, start, seed, key, step, BLOCK)
    for part in tl.static_range(4):
        offset = begin + part * BLOCK + tl.arange(0, BLOCK)
        value = _load(parameter_ptr, offset, count, MASKED) * decay
        grad = _load(grad_ptr, offset, count, MASKED) * factor
        exp_avg = _load(exp_avg_ptr, offset, count, MASKED)
        exp_avg_sq = _load(exp_avg_sq_ptr, offset, count, MASKED)
        exp_avg = exp_avg * beta1 + one_minus_beta1 * grad
        exp_avg_sq = exp_avg_sq * beta2 + one_minus_beta2 * grad * grad
        denominator = tl.sqrt(exp_avg_sq) / bias_correction2_sqrt + eps
        value -= step_size * (exp_avg / denominator)
        if STOCHASTIC:
            value = _round_stochastically(value, _word(part, r0, r1, r2, r3))
        _store(parameter_ptr, offset, count, value.to(PARAMETER), MASKED)
        _store(exp_avg_ptr, offset, count, exp_avg, MASKED)
        _store(exp_avg_sq_ptr, offset, count, exp_avg_sq, MASKED)


@thin_launch
@triton.jit(do_not_specialize=["tensors", "seed"])
def _adamw_kernel(
    table_ptr,
    lr_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    tensors,
    lr,
    log_beta1_high,
    log_beta1_low,
    log_beta2_high,
    log_beta2_low,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    weight_decay,
    seed,
    PARAMETER: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_LR: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CHUNK: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, count = chunk_of_program(table_ptr, tensors, CHUNK, SEARCH)
    if HAS_FOUND:
        count = tl.where(tl.load(found_inf_ptr) == 0, count, 0)
    parameter_ptr = address(table_ptr, tensors, 2, tensor, PARAMETER, ALIGNED) + start
    grad_ptr = address(table_ptr, tensors, 3, tensor, GRAD, ALIGNED) + start
    exp_avg_ptr = address(table_ptr, tensors, 4, tensor, tl.float32, ALIGNED) + start
    exp_avg_sq_ptr = address(table_ptr, tensors, 5, tensor, tl.float32, ALIGNED) + start
    step = tl.load(address(table_ptr, tensors, 6, tensor, tl.float32, False))
    # A step of 1 subtracts almost equal numbers: in float64, as on the host.
    count_of_steps = step.to(tl.float64)
    bias_correction1 = 1.0 - tl.exp(
        count_of_steps * log_beta1_high + count_of_steps * log_beta1_low
    )
    bias_correction2 = 1.0 - tl.exp(
        count_of_steps * log_beta2_high + count_of_steps * log_beta2_low
    )
    if HAS_LR:
        lr = tl.load(lr_ptr).to(tl.float32)
    step_size = (lr / bias_correction1).to(tl.float32)
    bias_correction2_sqrt = tl.sqrt(bias_correction2).to(tl.float32)
    decay = 1.0 - lr * weight_decay
    factor = 1.0
    if HAS_SCALE:
        factor = 1.0 / tl.load(grad_scale_ptr).to(tl.float32)
    if MAXIMIZE:
        factor = -factor
    key = tl.load(table_ptr + 7 * tensors + tensor).to(tl.uint32)
    # Whole blocks without a mask, so that loads and stores are as wide as they can be.
    whole = count // (4 * BLOCK) * (4 * BLOCK)
    for begin in range(0, whole, 4 * BLOCK):
        _update(
            parameter_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, begin, count, start, seed, key,
            step, factor, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size,
            bias_correction2_sqrt, PARAMETER, STOCHASTIC, False, BLOCK,
        )  # fmt: skip
    if whole < count:
        _update(
            parameter_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, whole, count, start, seed, key,
            step, factor, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size,
            bias_correction2_sqrt, PARAMETER, STOCHASTIC, True, BLOCK,
        )  # fmt: skip


def adamw(batch: AdamWBatch, settings: AdamWSettings) -> None:
    """Update parameters in place, in two launches."""
    parameters = batch.parameters
    device = parameters[0].device
    # Kept until the launches are made: some gradients are copies.
    grads = [each.contiguous() for each in batch.grads]
    lists = (parameters, grads, batch.exp_avgs, batch.exp_avg_sqs)
    table = make_table(
        [each.numel() for each in parameters],
        [[each.data_ptr() for each in tensors] for tensors in lists],
        device,
        others=([each.data_ptr() for each in batch.steps], batch.indices),
        write=write_numbers,
    )
    found_inf, grad_scale, lr = settings.found_inf, settings.grad_scale, settings.lr
    has_lr = isinstance(lr, Tensor) and lr.device == device
    stochastic = settings.stochastic_rounding and parameters[0].dtype == torch.bfloat16
    block = 1024
    _count_kernel[(ceil_div(table.tensors, block),)](
        table.values,
        found_inf,
        table.tensors,
        HAS_FOUND=found_inf is not None,
        BLOCK=block,
    )
    if table.chunks == 0:
        return
    logs = _logs(settings.betas)
    _adamw_kernel[(table.chunks,)](
        table.values,
        lr if has_lr else None,
        grad_scale,
        found_inf,
        table.tensors,
        0.0 if has_lr else float(lr),
        *logs,
        *settings.betas,
        1 - settings.betas[0],
        1 - settings.betas[1],
        settings.eps,
        settings.weight_decay,
        settings.seed,
        PARAMETER=TL_DTYPES[parameters[0].dtype],
        GRAD=TL_DTYPES[grads[0].dtype],
        ALIGNED=table.is_aligned,
        HAS_LR=has_lr,
        HAS_SCALE=grad_scale is not None,
        HAS_FOUND=found_inf is not None,
        MAXIMIZE=settings.maximize,
        STOCHASTIC=stochastic,
        CHUNK=CHUNK,
        SEARCH=256,
        BLOCK=BLOCK,
        num_warps=8,
    )


@cache
def _logs(betas: tuple[float, float]) -> tuple[float, float, float, float]:
    """Logarithms of both betas, each as a sum of two float32 numbers."""
    found: list[float] = []
    for beta in betas:
        # Of zero: a number whose exponential is zero.
        log = math.log(beta) if beta > 0 else -1e30
        high = float(torch.tensor(log, dtype=torch.float32))
        found += [high, log - high if beta > 0 else 0.0]
    return found[0], found[1], found[2], found[3]

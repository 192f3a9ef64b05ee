"""Which code is measured for a call: ours by backend, plain torch, torch.compile, other libraries."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lme_kernels import device as devices
from lme_kernels.bench.calls import Call, Case
from lme_kernels.bench.peers import PEERS, installed_peers
from lme_kernels.bench.stock import COMPILED_REFERENCES, STOCK
from lme_kernels.functional import ALL_OPS
from lme_kernels.inspection import count_calls

# Runs a call and returns its outputs.
Run = Callable[[], tuple[Tensor, ...]]
OPTIMIZERS = "optim."


def variants_of(case: Case, device: torch.device) -> list[str]:
    """List what can run a case here.

    Args:
        case: The case.
        device: Where it runs.

    Returns:
        "torch" (the reference), backends of the op, "eager" and "compile" (what a user of torch
        writes), and names of packages.
    """
    if case.op.startswith(OPTIMIZERS):
        if case.op != "optim.adamw":
            return ["ours", "foreach"]
        # Only bfloat16 is rounded; torch keeps its means in bfloat16 too, ours are float32.
        rounded = ["stochastic"] if "bfloat16" in case.name else []
        return ["ours", *rounded, "foreach", "fused"]
    op = ALL_OPS[case.op]
    names = [
        str(each)
        for each in op.implementations
        if devices.why_unavailable(each, device.type) is None
    ]
    names.append("torch")
    if case.op in STOCK:
        names.append("eager")
    if case.op in STOCK or case.op in COMPILED_REFERENCES:
        names.append("compile")
    return names + installed_peers(case.op)


def build(case: Case, call: Call, variant: str) -> tuple[Run, list[Tensor]]:
    """Make a case runnable.

    Args:
        case: The case.
        call: Its call, whose tensors this variant may overwrite.
        variant: One of `variants_of`.

    Returns:
        What runs it, and the leaves that get gradients.
    """
    if case.op.startswith(OPTIMIZERS):
        return _optimizer(case.op, call, variant), []
    arguments, leaves = call.prepared()
    function = _function(case.op, variant)

    def run() -> tuple[Tensor, ...]:
        result = function(*arguments, **call.options)
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    return run, leaves


def automatic_choice(case: Case, call: Call) -> str | None:
    """Run a call once with no backend named.

    Args:
        case: The case.
        call: Its call.

    Returns:
        The backend that ran; `None` where there is none to choose.
    """
    if case.op.startswith(OPTIMIZERS):
        return None
    with count_calls() as counts, torch.no_grad():
        ALL_OPS[case.op].function(*call.arguments, **call.options)
    ran = [name.partition("@")[2] for name in counts if name.startswith(f"{case.op}@")]
    return ran[0] if ran else None


def _function(op: str, variant: str) -> Callable[..., Any]:  # what it returns differs by op
    if variant == "eager":
        return STOCK[op]
    if variant == "compile":
        from torch._functorch import config

        torch._dynamo.reset()
        # A graph that is differentiated twice, as the backward alone is, needs its buffers.
        config.donated_buffer = False
        ALL_OPS[op].load()
        function = STOCK.get(op) or partial(ALL_OPS[op].function, backend="torch")
        return torch.compile(function)
    if variant in PEERS:
        return PEERS[variant][op]()
    ALL_OPS[op].load()
    return partial(ALL_OPS[op].function, backend=variant)


def _optimizer(op: str, call: Call, variant: str) -> Run:
    from lme_kernels import optim

    if op == "optim.adamw":
        values, grads = call.arguments
        parameters = [torch.nn.Parameter(each) for each in values]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        capturable = parameters[0].is_cuda
        if variant in ("ours", "stochastic"):
            optimizer: torch.optim.Optimizer = optim.AdamW(
                parameters,
                stochastic_rounding=variant == "stochastic",
                backend="triton" if capturable else None,
            )
        elif variant == "fused":
            optimizer = torch.optim.AdamW(parameters, fused=True, capturable=capturable)
        else:
            optimizer = torch.optim.AdamW(parameters, foreach=True, capturable=capturable)

        def step() -> tuple[Tensor, ...]:
            optimizer.step()
            return ()

        return step
    (grads,) = call.arguments
    if op == "optim.grad_norm":
        ours = partial(optim.grad_norm, backend="triton" if grads[0].is_cuda else None)
        norm = ours if variant == "ours" else torch.nn.utils.get_total_norm
        return partial(_norm, norm, grads)
    parameters = [torch.nn.Parameter(each) for each in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    ours = partial(optim.clip_grad_norm_, backend="triton" if grads[0].is_cuda else None)
    clip = ours if variant == "ours" else torch.nn.utils.clip_grad_norm_
    return partial(_norm, partial(clip, max_norm=1.0), parameters)


def _norm(
    function: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    return (function(tensors),)

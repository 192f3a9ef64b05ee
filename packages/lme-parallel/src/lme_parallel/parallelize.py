"""The order in which a model is prepared for its devices, in one function."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from lme_parallel.args import DistributedArgs
from lme_parallel.compile import apply_compile
from lme_parallel.materialize import InitialValue, materialize
from lme_parallel.recompute import apply_recompute
from lme_parallel.runtime import DistributedRuntime, Masters, Scaler
from lme_parallel.topology import Topology


def parallelize(
    model: nn.Module,
    topology: Topology,
    args: DistributedArgs,
    *,
    device: torch.device,
    dtype: torch.dtype,
    initial_value: InitialValue,
    masters: Callable[[nn.Module, torch.dtype], Masters] | None = None,
    scaler: Scaler | None = None,
    compile_backend: str = "inductor",
) -> DistributedRuntime:
    """Prepare a plain model for its devices and return what runs it.

    The order is: memory and first values, lower-precision copies, recomputation, compilation.

    Args:
        model: Has `blocks`, keyed by layer index as a string; usually on meta. Changed in place.
        topology: Where this process stands.
        args: The `distributed_args` section.
        device: This process's device.
        dtype: What the model computes in; parameters that are updated stay fp32.
        initial_value: First value of a parameter or saved buffer: name and region (`None` for
            all of it) to a tensor on the CPU.
        masters: Makes fp32 parameters behind a `bfloat16` or `float16` model; needed for those.
        scaler: Loss scale; needed for `float16`.
        compile_backend: Backend of `torch_compile: true`.

    Returns:
        The runtime, whose `model` computes in `dtype`.

    Raises:
        ValueError: If a setting does not fit the model or is not supported, naming it.
    """
    _check_supported(topology, args)
    lower = dtype not in (torch.float32, torch.float64)
    if lower and masters is None:
        raise ValueError(f"`dtype` {dtype} needs `masters`, the fp32 parameters behind the model")
    if dtype == torch.float16 and scaler is None:
        raise ValueError("`dtype` torch.float16 needs a `scaler`, or small gradients vanish")
    materialize(model, device, initial_value)
    made = masters(model, dtype) if lower and masters is not None else None
    blocks = _blocks(model)
    apply_recompute(blocks, args)
    if args.torch_compile:
        apply_compile(blocks.values(), backend=compile_backend)
    return DistributedRuntime(model, device=device, masters=made, scaler=scaler)


def _check_supported(topology: Topology, args: DistributedArgs) -> None:
    if topology.is_single:
        return
    axes = {
        "tensor_parallel_world_size": topology.tensor,
        "pipeline_parallel_world_size": topology.pipeline,
        "context_parallel_world_size": topology.context,
        "expert_parallel_world_size": topology.expert,
    }
    for name, size in axes.items():
        if size > 1:
            raise ValueError(f"`{name}: {size}` is not supported yet; use 1")
    raise ValueError(
        f"`stage: {args.stage}` with {topology.world_size} processes is not supported yet; start"
        " one process"
    )


def _blocks(model: nn.Module) -> Mapping[str, nn.Module]:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleDict):
        raise ValueError(
            f"a model must have `blocks`, a ModuleDict keyed by layer index;"
            f" {type(model).__name__} has none"
        )
    return dict(blocks.items())

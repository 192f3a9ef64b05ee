"""`FullyShardedDataParallel`: each unit's parameters are one flat tensor, cut evenly.

What a process holds of a parameter is a run of its elements, which may begin and end inside a
row. The names used below with an underscore are torch's own; no public ones give these facts.
"""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffload,
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
)
from torch.distributed.fsdp._runtime_utils import _reshard

from lme_parallel.materialize import InitialValue
from lme_parallel.placement import drop_gradients, saved_buffers
from lme_parallel.shards import Shard, flat_range, whole

_WRAPPER = "_fsdp_wrapped_module."
# By stage and whether there are copies: stages 1 and 2 keep whole parameters from the forward
# pass to the backward pass.
_STRATEGIES = {
    (False, False): ShardingStrategy.SHARD_GRAD_OP,
    (False, True): ShardingStrategy._HYBRID_SHARD_ZERO2,
    (True, False): ShardingStrategy.FULL_SHARD,
    (True, True): ShardingStrategy.HYBRID_SHARD,
}


def wrap_model(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    stage: int,
    device: torch.device,
    compute_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    offload: bool,
) -> FullyShardedDataParallel:
    """Wrap a model and each of its blocks; parameters get memory unit by unit, and no values.

    Args:
        model: With `blocks`; usually on meta. Its blocks are replaced by wrapped ones.
        mesh: One axis that cuts, or one that copies and one that cuts.
        stage: ZeRO stage, 1 to 3.
        device: Where it computes.
        compute_dtype: Of whole parameters; `None`: that of the shards.
        reduce_dtype: In which gradients are summed; `None`: that of whole parameters.
        offload: Keep shards in host memory.
    """
    made: dict[int, nn.Parameter] = {}

    def allocate(module: nn.Module) -> None:
        for name, each in module._parameters.items():
            if each is not None and each.is_meta:
                if id(each) not in made:
                    empty = torch.empty(each.shape, dtype=each.dtype, device=device)
                    made[id(each)] = nn.Parameter(empty, requires_grad=each.requires_grad)
                module.register_parameter(name, made[id(each)])

    for module in model.modules():
        # Small, and not the wrapper's business.
        for name, each in module._buffers.items():
            if each is not None and each.is_meta:
                module._buffers[name] = torch.empty(each.shape, dtype=each.dtype, device=device)

    def wrap(module: nn.Module) -> FullyShardedDataParallel:
        return FullyShardedDataParallel(
            module,
            device_mesh=mesh,
            sharding_strategy=_STRATEGIES[stage == 3, mesh.ndim == 2],
            cpu_offload=CPUOffload(offload_params=offload),
            mixed_precision=MixedPrecision(
                param_dtype=compute_dtype,
                reduce_dtype=reduce_dtype,
                cast_forward_inputs=False,
                cast_root_forward_inputs=False,
            ),
            param_init_fn=allocate,
            device_id=device,
            use_orig_params=True,
            limit_all_gathers=True,
        )

    blocks = model.get_submodule("blocks")
    for name, block in list(blocks.named_children()):
        setattr(blocks, name, wrap(block))
    wrapped = wrap(model)
    for unit in FullyShardedDataParallel.fsdp_modules(wrapped):
        # Losses are divided by global counts, so gradients are summed, not averaged.
        unit._gradient_predivide_factor = 1
        unit._gradient_postdivide_factor = 1
    return wrapped


class FlatParameters:
    """Each process updates its run of each parameter.

    Args:
        wrapped: From `wrap_model`.
        initial_value: First values.
        is_owner: Whether this process speaks for what it holds, of those that hold the same.
        sync_every_step: Whether gradients are reduced in each micro step.
        offload: Whether the runs are in host memory.
    """

    def __init__(
        self,
        wrapped: FullyShardedDataParallel,
        initial_value: InitialValue,
        *,
        is_owner: bool,
        sync_every_step: bool,
        offload: bool,
    ) -> None:
        self._wrapped = wrapped
        self._offload = offload
        # Gradients of the micro steps so far, where they are offloaded.
        self._sums: dict[str, Tensor] = {}
        self._sync_every_step = sync_every_step
        self._is_last = True
        self._parameters = {
            name.replace(_WRAPPER, ""): each for name, each in wrapped.named_parameters()
        }
        self._shards = _find_shards(wrapped, self._parameters, is_owner=is_owner)
        self._fill(initial_value)

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the local runs, each flat."""
        return self._parameters

    def named_buffers(self) -> Mapping[str, Tensor]:
        """Return the buffers that are saved."""
        saved = saved_buffers(self._wrapped)
        return {name.replace(_WRAPPER, ""): each for name, each in saved.items()}

    def shards(self) -> Mapping[str, Shard]:
        """Return which part of each parameter is here."""
        return self._shards

    def forward_module(self) -> nn.Module:
        """Return the wrapper."""
        return self._wrapped

    def begin(self, *, is_last: bool) -> None:
        """Remember whether the coming gradients complete the step."""
        self._is_last = is_last

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass."""
        syncs = self._is_last or self._sync_every_step or self._offload
        with nullcontext() if syncs else self._wrapped.no_sync():
            loss.backward()
        if self._offload:
            self._add_gradients()

    def finish(self) -> None:
        """Leave what was summed here on the local runs; the wrapper leaves gradients there."""
        for name, total in self._sums.items():
            self._parameters[name].grad = total
        self._sums.clear()

    def _add_gradients(self) -> None:
        # The wrapper does not add to gradients in host memory: it writes over them.
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if name in self._sums:
                self._sums[name] += parameter.grad
            else:
                self._sums[name] = parameter.grad.clone()
            parameter.grad = None

    def refresh(self) -> None:
        """Drop gradients and whole parameters, so that the next pass gathers new ones."""
        drop_gradients(self._parameters)
        for unit in FullyShardedDataParallel.fsdp_modules(self._wrapped):
            handle = unit._handle
            # Before the first pass there is nothing to drop, and with one process nothing is cut.
            if handle is not None and handle.uses_sharded_strategy and unit._is_root is not None:
                _reshard(unit, handle, free_unsharded_flat_param=True)

    @torch.no_grad()
    def _fill(self, initial_value: InitialValue) -> None:
        for name, parameter in self._parameters.items():
            for region, view in self._shards[name].views(parameter):
                view.copy_(initial_value(name, region))
        for name, buffer in self.named_buffers().items():
            buffer.copy_(initial_value(name, None))


def _find_shards(
    wrapped: FullyShardedDataParallel,
    parameters: Mapping[str, nn.Parameter],
    *,
    is_owner: bool,
) -> dict[str, Shard]:
    found: dict[int, Shard] = {}
    for unit in FullyShardedDataParallel.fsdp_modules(wrapped):
        if unit._handle is None:
            continue
        flat = unit._handle.flat_param
        if not unit._handle.uses_sharded_strategy:
            for parameter, shape in zip(flat._params or (), flat._shapes, strict=True):
                found[id(parameter)] = whole(shape, is_owner=is_owner)
            continue
        for parameter, shape, info in zip(
            flat._params or (), flat._shapes, flat._shard_param_infos, strict=True
        ):
            start, last = info.intra_param_start_idx, info.intra_param_end_idx
            # Without a place, nothing of it is here.
            start, stop = (0, 0) if start is None or last is None else (start, last + 1)
            found[id(parameter)] = flat_range(shape, start, stop, is_owner=is_owner)
    return {name: found[id(each)] for name, each in parameters.items()}

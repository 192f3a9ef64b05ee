"""`fully_shard`: ZeRO stages 0 to 3, hybrid sharding, mixed precision, parameters on the host."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard as ShardPlacement
from torch.utils._python_dispatch import _disable_current_modes

from lme_parallel.local import local_of, local_parameter, shard_of
from lme_parallel.placement import drop_gradients, saved_buffers
from lme_parallel.shards import Shard


def shard_model(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    apart: Sequence[tuple[nn.Module, DeviceMesh]] = (),
    stage: int,
    compute_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    offload: bool,
) -> None:
    """Cut every parameter of a model over a mesh, in place; names stay.

    Args:
        model: Usually on meta.
        blocks: Each is gathered, and its gradients are reduced, as one.
        mesh: One axis that cuts, or one that copies and one that cuts.
        apart: Modules inside the blocks that are gathered by themselves, over meshes of their own.
        stage: ZeRO stage; 3 frees a block's whole parameters after its forward pass.
        compute_dtype: Of whole parameters; `None`: that of the shards.
        reduce_dtype: In which gradients are summed; `None`: that of whole parameters.
        offload: Keep shards in host memory.
    """
    policy: OffloadPolicy = OffloadPolicy()
    if offload:
        policy = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    options = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
        ),
        "offload_policy": policy,
    }

    def shard(module: nn.Module, over: DeviceMesh, *, frees: bool) -> None:
        size = over.size(over.ndim - 1)

        def place(parameter: nn.Parameter) -> ShardPlacement:
            return ShardPlacement(shard_dim(parameter.shape, size))

        fully_shard(
            module, mesh=over, reshard_after_forward=frees, shard_placement_fn=place, **options
        )

    for module, over in apart:
        shard(module, over, frees=stage == 3)
        _hide_gathers(module)
    for block in blocks:
        shard(block, mesh, frees=stage == 3)
    # What is left is used first in the backward pass, so it stays whole until then.
    shard(model, mesh, frees=False)
    for module in _units(model):
        # Losses are divided by global counts, so gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _hide_gathers(module: nn.Module) -> None:
    """Let gathering stay unseen by a recomputed block around it that keeps results of some ops.

    Its gathers are not the same forwards and again, which such a block takes for a mistake.
    """
    # Hooks have no public names, and neither has what hides them.
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in hooks.items():
            hooks[key] = torch.compiler.disable(partial(_unseen, hook))


def _unseen(hook: Callable[..., Any], *inputs: Any, **options: Any) -> Any:  # torch's own
    with _disable_current_modes():
        return hook(*inputs, **options)


def shard_dim(shape: torch.Size, size: int) -> int:
    """Choose the dim that is cut: 0, or where it is too short another that divides evenly."""
    if not shape or shape[0] >= size:
        return 0
    return next(
        (dim for dim, length in enumerate(shape) if length > size and length % size == 0), 0
    )


def adopt_values(model: nn.Module) -> None:
    """Let the units of a model take over shards that were put in place of those on meta."""
    model._apply(lambda tensor: tensor)
    for unit in _units(model):
        # Torch 2.9 copies uneven shards once more at the first forward pass, away from who updates
        # them; later versions see that nothing changed.
        group = getattr(unit._get_fsdp_state(), "_fsdp_param_group", None)
        if group is not None and hasattr(group, "_reset_sharded_params"):
            group._reset_sharded_params = True


class ShardedParameters:
    """Each process updates its shards; whole parameters exist while they are computed with.

    Args:
        model: Prepared by `shard_model`, with values.
        stage: ZeRO stage.
        sync_every_step: Whether gradients are reduced in each micro step.
    """

    def __init__(self, model: nn.Module, *, stage: int, sync_every_step: bool) -> None:
        self._model = model
        self._stage = stage
        self._sync_every_step = sync_every_step
        self._units = _units(model)
        self._root = self._units[0]
        self._cut: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._parameters = {name: local_parameter(each) for name, each in self._cut.items()}

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the local shards, which share memory with the model's."""
        return self._parameters

    def named_buffers(self) -> Mapping[str, Tensor]:
        """Return the buffers that are saved."""
        return saved_buffers(self._model)

    def shards(self) -> Mapping[str, Shard]:
        """Return which part of each parameter is here."""
        return {name: shard_of(each) for name, each in self._cut.items()}

    def forward_module(self) -> nn.Module:
        """Return the model, whose calls gather what they need."""
        return self._model

    def begin(self, *, is_last: bool) -> None:
        """Decide what the coming backward pass reduces and frees."""
        self._root.set_requires_gradient_sync(is_last or self._sync_every_step)
        # Stages below 3 keep whole parameters for the whole step.
        self._root.set_reshard_after_backward(is_last or self._stage == 3)
        self._root.set_is_last_backward(is_last)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass."""
        loss.backward()

    def finish(self) -> None:
        """Hand the shards of the gradients to the local parameters.

        Raises:
            RuntimeError: If the model's shards are no longer those handed out.
        """
        for name, cut in self._cut.items():
            local = self._parameters[name]
            if not _same_memory(cut, local):
                raise RuntimeError(f"the shard of `{name}` was replaced since it was handed out")
            local.grad = None if cut.grad is None else local_of(cut.grad)

    def refresh(self) -> None:
        """Drop gradients and whole parameters, so that the next pass gathers new ones."""
        drop_gradients(self._parameters)
        drop_gradients(self._cut)
        for unit in self._units:
            unit.reshard()


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _same_memory(cut: nn.Parameter, local: nn.Parameter) -> bool:
    return local.numel() == 0 or local_of(cut).data_ptr() == local.data_ptr()

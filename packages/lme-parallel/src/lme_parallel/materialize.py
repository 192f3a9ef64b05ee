"""Memory and first values for a model that was built on the meta device."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lme_parallel.shards import Region

InitialValue = Callable[[str, Region | None], Tensor]
"""Name and region (`None`: all of it) to values on the CPU."""


def materialize(
    model: nn.Module,
    device: torch.device,
    initial_value: InitialValue,
    *,
    parameter_device: torch.device | None = None,
) -> None:
    """Give every parameter and buffer memory on `device`, and those on meta their first value.

    Tied parameters stay tied. What already has values keeps them and only moves. Of a parameter
    that is cut over processes only the local part is asked for and made.

    Args:
        model: Changed in place.
        device: Where parameters and buffers go.
        parameter_device: Where cut parameters go; `None`: `device` too.
        initial_value: Called with the first name of each parameter or buffer on meta.

    Raises:
        ValueError: If an initial value has another shape than its parameter or buffer.
    """
    # By identity, so that a parameter under two names is made once and stays one.
    made: dict[int, Tensor] = {}
    with torch.no_grad():
        for module_name, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    full_name = f"{module_name}.{name}" if module_name else name
                    place = parameter_device or device
                    data = _values(full_name, parameter, place, initial_value)
                    made[id(parameter)] = (
                        parameter
                        if data is parameter
                        else nn.Parameter(data, requires_grad=parameter.requires_grad)
                    )
                module.register_parameter(name, made[id(parameter)])  # type: ignore[arg-type] # a Parameter by construction
            for name, buffer in list(module._buffers.items()):
                if buffer is None:
                    continue
                full_name = f"{module_name}.{name}" if module_name else name
                if id(buffer) not in made:
                    made[id(buffer)] = _values(full_name, buffer, device, initial_value)
                module._buffers[name] = made[id(buffer)]


def _values(name: str, tensor: Tensor, device: torch.device, initial_value: InitialValue) -> Tensor:
    if is_cut(tensor):
        return _cut_values(name, tensor, device, initial_value)
    if not tensor.is_meta:
        return tensor if tensor.device == device else tensor.detach().to(device)
    values = initial_value(name, None)
    _check_shape(name, values, tensor.shape)
    # A copy even where nothing has to change: two parameters may be given the same memory.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(values)


def _cut_values(
    name: str, tensor: Tensor, device: torch.device, initial_value: InitialValue
) -> Tensor:
    from lme_parallel.local import (  # noqa: PLC0415 (slow to load; for several processes)
        empty_local,
        local_of,
        shard_of,
    )

    if not local_of(tensor).is_meta:
        return tensor if tensor.device == device else tensor.detach().to(device)
    made = empty_local(tensor, device)
    for region, view in shard_of(tensor).views(local_of(made)):
        values = initial_value(name, region)
        _check_shape(name, values, view.shape)
        view.copy_(values)
    return made


def is_cut(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without loading that code where none can be."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "device_mesh")


def _check_shape(name: str, values: Tensor, shape: torch.Size) -> None:
    if values.shape != shape:
        raise ValueError(
            f"the initial value of `{name}` must have shape {tuple(shape)}, got"
            f" {tuple(values.shape)}"
        )

"""Memory and first values for a model that was built on the meta device."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

InitialValue = Callable[[str, tuple[slice, ...] | None], Tensor]
"""Name and region (`None`: all of it) to values on the CPU."""


def materialize(model: nn.Module, device: torch.device, initial_value: InitialValue) -> None:
    """Give every parameter and buffer memory on `device`, and those on meta their first value.

    Tied parameters stay tied. What already has values keeps them and only moves.

    Args:
        model: Changed in place.
        device: Where parameters and buffers go.
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
                    data = _values(full_name, parameter, device, initial_value)
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
    if not tensor.is_meta:
        return tensor if tensor.device == device else tensor.detach().to(device)
    values = initial_value(name, None)
    if values.shape != tensor.shape:
        raise ValueError(
            f"the initial value of `{name}` must have shape {tuple(tensor.shape)}, got"
            f" {tuple(values.shape)}"
        )
    # A copy even where nothing has to change: two parameters may be given the same memory.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(values)

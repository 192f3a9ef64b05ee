"""An optimizer's state by parameter name, taken out and put back by hand."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lme_parallel.checkpoint.documents import Json
from lme_parallel.checkpoint.errors import CheckpointError, CheckpointMismatchError
from lme_parallel.shards import Shard, whole


def tensor_state(optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Return every tensor of the state as `<parameter name>.<state name>`.

    Args:
        optimizer: Any torch optimizer whose state is tensors and numbers by parameter.
        names: Names of its parameters.

    Raises:
        CheckpointError: If a parameter has no name, or a state is neither tensor nor number.
    """
    found = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            name = f"{_name(parameter, names)}.{_state_name(key)}"
            if isinstance(value, Tensor):
                found[name] = value
            elif value is not None and not isinstance(value, (bool, int, float)):
                raise CheckpointError(
                    f"`{type(optimizer).__name__}` keeps {name} as a {type(value).__name__};"
                    " only tensors and numbers can be saved"
                )
    return found


def other_state(optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[str, Json]:
    """Return the part that is not tensors: numbers by parameter, and each group's learning rate."""
    numbers: dict[str, dict[str, Json]] = {}
    for parameter, state in optimizer.state.items():
        plain = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        if plain:
            numbers[_name(parameter, names)] = plain
    groups = [
        {
            "learning_rate": float(group["lr"]),
            "parameters": [_name(parameter, names) for parameter in group["params"]],
        }
        for group in optimizer.param_groups
        if "lr" in group
    ]
    return {"numbers": numbers, "groups": groups}


def is_other_state(value: Json) -> bool:
    """Return whether `value` has the form that `other_state` gives."""
    if not isinstance(value, dict) or set(value) != {"numbers", "groups"}:
        return False
    numbers, groups = value["numbers"], value["groups"]
    return (
        isinstance(numbers, dict)
        and all(isinstance(each, dict) for each in numbers.values())
        and isinstance(groups, list)
        and all(
            isinstance(group, dict)
            and isinstance(group.get("learning_rate"), (int, float))
            and isinstance(group.get("parameters"), list)
            and all(isinstance(name, str) for name in group["parameters"])
            for group in groups
        )
    )


def split_name(name: str) -> tuple[str, str]:
    """Split `<parameter name>.<state name>`; a state name has no dot."""
    parameter, _, state = name.rpartition(".")
    return parameter, state


def state_shard(name: str, tensor: Tensor, parameter: Tensor, shard: Shard | None) -> Shard:
    """Return which part of a tensor of the state is here.

    Args:
        name: Of the state, for the error.
        tensor: Of the state.
        parameter: The local part of the parameter that it belongs to.
        shard: Which part of the parameter that is; `None`: all.

    Raises:
        CheckpointError: If the parameter is cut and the state is neither cut alike nor one number.
    """
    if shard is None:
        return whole(tensor.shape)
    if tensor.shape == parameter.shape:
        return shard
    if tensor.numel() > 1 and not shard.is_whole:
        raise CheckpointError(
            f"{name} has shape {tuple(tensor.shape)}, but its parameter is cut to"
            f" {tuple(parameter.shape)}; only state of the same shape and numbers can be saved"
        )
    return whole(tensor.shape)


def merge_other_states(states: Sequence[Json]) -> Json:
    """Put together what `other_state` gave in processes that hold different parameters."""
    found = [each for each in states if each is not None]
    if not found:
        return None
    numbers: dict[str, Json] = {}
    rates: dict[str, float] = {}
    for state in found:
        numbers |= state["numbers"]
        for group in state["groups"]:
            rates |= dict.fromkeys(group["parameters"], group["learning_rate"])
    groups: dict[float, list[str]] = {}
    for name, rate in rates.items():
        groups.setdefault(rate, []).append(name)
    listed = [{"learning_rate": rate, "parameters": names} for rate, names in groups.items()]
    return {"numbers": numbers, "groups": listed}


def groups_by_parameter(optimizer: Optimizer) -> dict[Tensor, Mapping[str, Any]]:
    """Return each parameter's group of options."""
    return {each: group for group in optimizer.param_groups for each in group["params"]}


def state_device(
    parameter: nn.Parameter, group: Mapping[str, Any] | None, key: str
) -> torch.device:
    """Return where an optimizer expects a tensor of its state.

    Args:
        parameter: Whose state it is.
        group: Options of the parameter's group; `None` if it has none.
        key: Name of the state.

    Returns:
        The parameter's device; the CPU for `step`, unless the update reads it on the device.
    """
    on_device = group is not None and (group.get("capturable") or group.get("fused"))
    return torch.device("cpu") if key == "step" and not on_device else parameter.device


def restore_state(
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    other: Json,
    *,
    elsewhere: Collection[str] = (),
) -> None:
    """Replace the whole state.

    Args:
        optimizer: Changed in place; state that it has and the checkpoint lacks goes.
        parameters: By name.
        tensors: As `tensor_state` named them, already on their devices.
        other: From `other_state`.
        elsewhere: Parameters that other processes have.

    Raises:
        CheckpointMismatchError: If a parameter is not known.
    """
    states: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        parameter, key = split_name(name)
        states.setdefault(parameter, {})[key] = tensor
    for parameter, numbers in other["numbers"].items():
        states.setdefault(parameter, {}).update(numbers)
    states = {
        name: each for name, each in states.items() if name in parameters or name not in elsewhere
    }
    unknown = sorted(set(states) - set(parameters))
    if unknown:
        raise CheckpointMismatchError(
            f"the checkpoint has optimizer state for {', '.join(unknown[:5])}, which this model"
            " does not train"
        )
    optimizer.state.clear()
    for parameter, state in states.items():
        optimizer.state[parameters[parameter]] = state


def restore_learning_rates(optimizer: Optimizer, names: Mapping[Tensor, str], other: Json) -> None:
    """Set each group's learning rate to that of the saved group of its first parameter."""
    saved = {
        name: group["learning_rate"] for group in other["groups"] for name in group["parameters"]
    }
    for group in optimizer.param_groups:
        rate = saved.get(names[group["params"][0]]) if group["params"] else None
        if rate is not None and "lr" in group:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def _name(parameter: Tensor, names: Mapping[Tensor, str]) -> str:
    if parameter not in names:
        raise CheckpointError(
            f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not among"
            " those to be saved"
        )
    return names[parameter]


def _state_name(key: object) -> str:
    if not isinstance(key, str) or "." in key:
        raise CheckpointError(f"the optimizer has a state called {key!r}; it must have no dot")
    return key

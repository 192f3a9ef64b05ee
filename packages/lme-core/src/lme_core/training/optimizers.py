"""Optimizers by name, and which parameters they decay and how fast they learn."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from lme_core.training.optimizer_args import OptimizerArgs, TorchAdamWArgs, TorchLBFGSArgs
from lme_kernels.optim.adamw import ADAMW, AdamW
from lme_kernels.policy import KernelPolicy

__all__ = [
    "OptimizerArgs",
    "TorchAdamWArgs",
    "Traits",
    "build_optimizer",
    "parameter_groups",
    "step_optimizer",
]

# torch has a fused update for these, and it skips a step on the device when told to.
_FUSED = frozenset({torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad})
_FUSED_DEVICES = frozenset({"cpu", "cuda"})


class Traits(Protocol):
    """What a model says about one of its parameters."""

    @property
    def weight_decay(self) -> bool:
        """Whether weight decay acts on it."""
        ...

    @property
    def mup(self) -> bool:
        """Whether it learns at the learning rate divided by `m_width` under mup."""
        ...


def parameter_groups(
    named_parameters: Mapping[str, Parameter],
    traits: Mapping[str, Traits],
    *,
    method: str | None,
    m_width: float | None,
    lr: float,
) -> list[dict[str, Any]]:
    """Sort parameters into groups of equal learning rate and weight decay.

    Args:
        named_parameters: By fully qualified name; those without gradient are left out.
        traits: For each of these names at least, what the model says about it.
        method: null, or mup.
        m_width: Width multiplier of the model; needed by mup.
        lr: Learning rate of a normal group.

    Returns:
        Groups with `name`, `params` and `param_names` sorted by name, and where they differ from
        the optimizer's defaults `lr` and `weight_decay`. In order: normal, no_weight_decay, mup,
        mup_no_weight_decay; empty ones are left out. Both traits count: a parameter that is
        marked for mup and not for decay is not decayed.

    Raises:
        ValueError: If mup is asked for and the model has no `m_width`, or a name has no traits.
    """
    if method == "mup" and m_width is None:
        raise ValueError(
            "`optimizer_args.params_group_method: mup` needs `m_width` in "
            "`model_args.pretrained_config`; set it, or use null"
        )
    trained = sorted(name for name, each in named_parameters.items() if each.requires_grad)
    missing = [name for name in trained if name not in traits]
    if missing:
        raise ValueError(f"the model says nothing about the parameters {', '.join(missing)}")
    names: dict[str, list[str]] = {
        "normal": [],
        "no_weight_decay": [],
        "mup": [],
        "mup_no_weight_decay": [],
    }
    for name in trained:
        mup = method == "mup" and traits[name].mup
        decay = traits[name].weight_decay
        if mup:
            names["mup" if decay else "mup_no_weight_decay"].append(name)
        else:
            names["normal" if decay else "no_weight_decay"].append(name)
    groups: list[dict[str, Any]] = []
    for group, members in names.items():
        if not members:
            continue
        entry: dict[str, Any] = {
            "name": group,
            "params": [named_parameters[name] for name in members],
            "param_names": members,
        }
        if group.startswith("mup") and m_width is not None:
            entry["lr"] = lr / m_width
        if group.endswith("no_weight_decay"):
            entry["weight_decay"] = 0.0
        groups.append(entry)
    return groups


def build_optimizer(
    args: OptimizerArgs,
    named_parameters: Mapping[str, Parameter],
    traits: Mapping[str, Traits],
    m_width: float | None = None,
    kernels: KernelPolicy | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer of a run.

    Where `fused` and `foreach` are null and every parameter is on a device with a fused update,
    that is taken: it is as fast as any, and it can skip a step without asking the host. TorchAdamW
    then takes this project's own, whose state is the same, if `kernels` names it or it is proven
    there.

    Args:
        args: `optimizer_args` of the run file.
        named_parameters: What it updates, by fully qualified name.
        traits: What the model says about each of these names.
        m_width: Width multiplier of the model; needed by mup.
        kernels: What the run's `kernel_args` say about `adamw`; `None` for torch's.

    Returns:
        A torch optimizer whose groups carry `name` and `param_names`.

    Raises:
        ValueError: If L-BFGS is asked for, or a group cannot be made (`parameter_groups`).
    """
    if isinstance(args, TorchLBFGSArgs):
        raise ValueError("`optimizer_args.class_name` must not be TorchLBFGS")
    groups = parameter_groups(
        named_parameters,
        traits,
        method=args.params_group_method,
        m_width=m_width,
        lr=args.class_args.lr,
    )
    settings = asdict(args.class_args)
    if "weight_decay" not in settings:
        for group in groups:
            group.pop("weight_decay", None)
    if settings.get("fused", False) is None:
        devices = {parameter.device.type for parameter in named_parameters.values()}
        if settings["foreach"] is None and devices <= _FUSED_DEVICES:
            settings["fused"] = True
            if kernels is not None and isinstance(args, TorchAdamWArgs):
                own = _own_adamw(groups, settings, kernels.choice(ADAMW.name).backend)
                if own is not None:
                    return own
    return light_class(args.torch_class)(groups, **settings)


def _own_adamw(
    groups: list[dict[str, Any]], settings: Mapping[str, Any], backend: str | None
) -> torch.optim.Optimizer | None:
    """This project's AdamW; `None` if torch's is wanted or better proven, or has what it has not."""
    if settings["amsgrad"] or backend == "torch":
        return None
    if backend is None:
        first = groups[0]["params"][0].detach()
        # Gradients are like parameters, and means are float32.
        if ADAMW.choose(None, first, first, first.float()) is ADAMW.reference:
            return None
    taken = ("lr", "betas", "eps", "weight_decay", "maximize")
    return AdamW(groups, **{name: settings[name] for name in taken}, backend=backend)


def light_class(torch_class: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Derive an optimizer that does not load torch's compiler.

    Torch's own methods import it to say that they must not be compiled, which takes seconds at
    the start of every run, compiled or not.

    Args:
        torch_class: One of torch's optimizers.

    Returns:
        A subclass of the same name that computes the same.
    """
    add = inspect.unwrap(torch_class.add_param_group)
    update = inspect.unwrap(torch_class.step)

    def add_param_group(self: torch.optim.Optimizer, param_group: dict[str, Any]) -> None:
        add(self, param_group)

    @torch.no_grad()
    def step(self: torch.optim.Optimizer, closure: None = None) -> None:
        update(self, closure)

    members = {"__doc__": torch_class.__doc__, "add_param_group": add_param_group, "step": step}
    return type(torch_class.__name__, (torch_class,), members)


def step_optimizer(optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> None:
    """Update the parameters, unless the gradient norm is not finite.

    A fused optimizer decides on the device; any other waits for the norm.

    Args:
        optimizer: What updates.
        grad_norm: Global gradient norm, 0-d, on the parameters' device.
    """
    finite = torch.isfinite(grad_norm)
    fused = all(group.get("fused") for group in optimizer.param_groups)
    if not fused:
        if bool(finite):
            optimizer.step()
        return
    # The protocol of torch's own gradient scaler: a fused step reads this attribute.
    optimizer.found_inf = torch.logical_not(finite).float()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]

"""Where parameters are between steps, and what happens to their gradients in one."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lme_parallel.shards import Shard, whole


class Masters(Protocol):
    """fp32 parameters behind a model whose own are in a lower precision."""

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the fp32 parameters by name."""
        ...

    def collect_gradients(self) -> None:
        """Add the model's gradients to the fp32 ones and clear them."""
        ...

    def refresh(self) -> None:
        """Copy the fp32 parameters into the model."""
        ...


class Placement(Protocol):
    """One way to place parameters: whole here, whole everywhere, or in shards."""

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return plain local tensors, fp32 or wider, that the optimizer updates."""
        ...

    def named_buffers(self) -> Mapping[str, Tensor]:
        """Return the buffers that are saved with the model."""
        ...

    def shards(self) -> Mapping[str, Shard]:
        """Return which part of each parameter is here."""
        ...

    def forward_module(self) -> Any:  # what an objective calls: the model, or a wrapper of it
        """Return what is called in place of the model."""
        ...

    def begin(self, *, is_last: bool) -> None:
        """Prepare for a micro step; `is_last` is the one after which gradients are complete."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a micro step."""
        ...

    def finish(self) -> None:
        """Leave complete gradients on `named_parameters()`, after the last micro step."""
        ...

    def refresh(self) -> None:
        """Let the model compute with changed parameters, and drop the gradients."""
        ...


class WholeParameters:
    """Everything is in this process, and there is no other.

    Args:
        model: On its device.
        masters: fp32 parameters, where the model's own are lower.
    """

    def __init__(self, model: nn.Module, masters: Masters | None) -> None:
        self._model = model
        self._masters = masters
        named = model.named_parameters() if masters is None else masters.named_parameters().items()
        self._parameters = dict(named)

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters, or their masters."""
        return self._parameters

    def named_buffers(self) -> Mapping[str, Tensor]:
        """Return the buffers that are saved."""
        return saved_buffers(self._model)

    def shards(self) -> Mapping[str, Shard]:
        """Return that all is here."""
        return {name: whole(each.shape) for name, each in self._parameters.items()}

    def forward_module(self) -> nn.Module:
        """Return the model."""
        return self._model

    def begin(self, *, is_last: bool) -> None:
        """Need nothing."""

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass and add its gradients to the masters'."""
        loss.backward()
        if self._masters is not None:
            self._masters.collect_gradients()

    def finish(self) -> None:
        """Need nothing: gradients are where they belong."""

    @torch.no_grad()
    def refresh(self) -> None:
        """Drop the gradients and renew the low-precision copies."""
        drop_gradients(self._parameters)
        if self._masters is not None:
            self._masters.refresh()


class PlacementAround:
    """A placement around another: what it does not do itself, that one does.

    Args:
        placement: The one inside.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return what is here."""
        return self._placement.named_parameters()

    def named_buffers(self) -> Mapping[str, Tensor]:
        """Return the buffers that are saved."""
        return self._placement.named_buffers()

    def shards(self) -> Mapping[str, Shard]:
        """Return which part of each parameter is here."""
        return self._placement.shards()

    def forward_module(self) -> Any:  # as `Placement` says
        """Return what is called in place of the model."""
        return self._placement.forward_module()

    def begin(self, *, is_last: bool) -> None:
        """Prepare for a micro step."""
        self._placement.begin(is_last=is_last)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass."""
        self._placement.backward(loss)

    def finish(self) -> None:
        """Leave complete gradients."""
        self._placement.finish()

    def refresh(self) -> None:
        """Let the model compute with changed parameters, and drop the gradients."""
        self._placement.refresh()


def drop_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Free the gradients of parameters."""
    for parameter in parameters.values():
        parameter.grad = None


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are part of a model's state, by name."""
    return {name: each for name, each in model.named_buffers() if _is_saved(model, name)}


def _is_saved(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf not in model.get_submodule(owner)._non_persistent_buffers_set

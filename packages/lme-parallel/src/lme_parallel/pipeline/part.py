"""A model of which only some stages are here, called stage by stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

from torch import Tensor, nn

Batch = Mapping[str, Tensor]


class Sliceable(Protocol):
    """What a model has so that it can be cut into stages."""

    blocks: nn.ModuleDict
    """By layer."""

    def part_costs(self) -> tuple[float, tuple[float, ...], float]:
        """Return the work of the embedding, of each block and of the head, in one unit."""
        ...

    def part_ends(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the modules before the blocks, and of those after them."""
        ...

    def forward_part(
        self,
        batch: Batch,
        tensors: tuple[Tensor, ...] | None,
        layers: Sequence[int],
        *,
        is_last: bool,
        **options: Any,  # what objectives call the model with
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Run some layers: from the batch or from tensors, to tensors or to the loss.

        Returns:
            What the next stage reads, nothing after the last, and outputs as of `forward`, a
            dataclass, with the losses of these layers only.
        """
        ...


@dataclass(frozen=True, slots=True)
class Stage:
    """One piece of the model."""

    index: int
    layers: tuple[int, ...]
    is_first: bool
    is_last: bool


class PartForward:
    """The forward pass of a model of which only parts are here; gives containers torch knows."""

    def __init__(self, model: Sliceable) -> None:
        self._run = model.forward_part
        self.outputs_type: type | None = None
        """Of the model's outputs, once it has run."""

    def __call__(
        self,
        batch: Batch,
        tensors: tuple[Tensor, ...] | None,
        stage: Stage,
        options: dict[str, Any],
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Run one stage.

        Returns:
            What the next stage reads, and the fields of the outputs by name.
        """
        results, outputs = self._run(batch, tensors, stage.layers, is_last=stage.is_last, **options)
        if not is_dataclass(outputs) or isinstance(outputs, type):
            raise TypeError(f"outputs of a model must be a dataclass, got {type(outputs).__name__}")
        self.outputs_type = type(outputs)
        # What shards parameters looks for tensors in what a model returns.
        return results, {each.name: getattr(outputs, each.name) for each in fields(outputs)}


class StageView:
    """What an objective gets in place of the model: one stage, with inputs from the one before.

    Args:
        module: Called in place of the model.
        forward: Of the model.
        stage: Which one.
        inputs: From the stage before; `None` for the first.
    """

    def __init__(
        self,
        module: Any,  # the model, or a wrapper of it
        forward: PartForward,
        stage: Stage,
        inputs: tuple[Tensor, ...] | None,
    ) -> None:
        self._module = module
        self._forward = forward
        self._stage = stage
        self._inputs = inputs
        self.results: tuple[Tensor, ...] | None = None
        """What the next stage reads, once the objective called the model."""

    def __call__(self, batch: Batch, **options: Any) -> Any:  # as the model's own
        """Run the stage as the objective asks.

        Raises:
            ValueError: If the objective calls the model twice in one micro batch.
        """
        if self.results is not None:
            raise ValueError("in a pipeline an objective can call the model once a micro batch")
        self.results, values = self._module(batch, self._inputs, self._stage, options)
        if self._forward.outputs_type is None:
            raise RuntimeError("the model was called and left no outputs")
        return self._forward.outputs_type(**values)

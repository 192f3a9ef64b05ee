"""One step, or one evaluation, of the stages that are here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lme_parallel.pipeline.backward import Pass, WeightsPass, backward_input
from lme_parallel.pipeline.exchange import Arriving, Exchange
from lme_parallel.pipeline.orders import Action, Kind, Schedule
from lme_parallel.pipeline.part import PartForward, Stage, StageView
from lme_parallel.pipeline.plan import Message, Step, Transfer
from lme_parallel.placement import Placement

Batch = Mapping[str, Tensor]
Sums = Any  # the objective's LossSum


class Objective(Protocol):
    """As the runtime's."""

    def forward(self, model: Any, batch: Batch) -> Any:  # outputs are the objective's own
        """Run the model."""
        ...

    def loss(self, outputs: Any, batch: Batch) -> Any:  # as above
        """Return sums over the batch."""
        ...


@dataclass(frozen=True, slots=True)
class StepCalls:
    """What a step does besides moving tensors."""

    objective: Objective
    loss: Callable[[Sums], Tensor]
    """The share of what is minimised of one stage's sums, scaled."""
    add: Callable[[Sums], None]
    """Takes note of one stage's sums."""
    mark: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Part:
    """What of a pipeline is here."""

    schedule: Schedule
    rank: int
    """Of this process in its pipeline."""
    stages: Mapping[int, Stage]
    """Those that are here, by index."""
    model: nn.Module
    forward: PartForward
    """Of the model."""
    placement: Placement
    """Of its parameters."""
    exchange: Exchange
    """With the other processes of the pipeline."""
    splits: bool
    """Whether gradients of inputs are computed before those of parameters, where the schedule says
    so; otherwise both are computed together."""


class Run:
    """The micro batches of one step.

    Args:
        part: What is here.
        batches: Micro batches, on the device.
        calls: What to do with them.
        plan: Computations and messages of this process, in order.
    """

    def __init__(
        self, part: Part, batches: Sequence[Batch], calls: StepCalls, plan: Sequence[Step]
    ) -> None:
        self._part = part
        self._batches = batches
        self._calls = calls
        self._plan = plan
        self._passes: dict[tuple[int, int], Pass] = {}
        # What is here or on its way, by the stage that computed it and the micro batch.
        self._arriving: dict[tuple[int, int], Arriving] = {}
        self._here: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self._gradients: dict[tuple[int, int], list[Tensor]] = {}
        gives = (Kind.BACKWARD, Kind.BACKWARD_WEIGHT)
        backwards = [
            number
            for number, step in enumerate(plan)
            if isinstance(step, Action) and step.kind in gives
        ]
        self._last = backwards[-1] if backwards else -1
        self._parameters = [each for each in part.model.parameters() if each.requires_grad]

    def run(self) -> None:
        """Do everything in order."""
        for number, step in enumerate(self._plan):
            if isinstance(step, Transfer):
                self._transfer(step)
            elif step.kind == Kind.FORWARD:
                self._calls.mark("forward")
                self._forward(step.stage, step.micro)
            else:
                self._calls.mark("backward")
                self._backward(step, is_last=number == self._last)
        self._part.exchange.finish()

    def _transfer(self, step: Transfer) -> None:
        key, exchange = (step.stage, step.micro), self._part.exchange
        if step.kind == Message.SEND_FORWARD:
            # What has a backward pass stays until then.
            kept = self._here.pop(key)
            exchange.send(kept, step.peer, self._kind(*key))
        elif step.kind == Message.RECEIVE_FORWARD:
            self._arriving[key] = exchange.receive(step.peer, self._kind(*key))
        elif step.kind == Message.SEND_GRADIENT:
            exchange.send_known(self._gradients.pop(key), step.peer)
        else:
            specs = [each for each in exchange.specs(self._kind(*key)) if each.has_gradient]
            self._arriving[key] = exchange.receive_known(specs, step.peer)

    def _kind(self, stage: int, micro: int) -> tuple[int, tuple[int, ...], bool]:
        # What a stage passes on has a shape that follows from the batch's.
        shape = tuple(self._batches[micro]["input_ids"].shape)
        return stage, shape, torch.is_grad_enabled()

    def _forward(self, index: int, micro: int) -> None:
        stage, batch = self._part.stages[index], self._batches[micro]
        inputs = self._inputs(index, micro)
        results, sums = self._call(batch, stage, inputs)
        self._calls.add(sums)
        if torch.is_grad_enabled():
            loss = self._calls.loss(sums)
            self._passes[index, micro] = Pass(inputs, results, loss)
        if not stage.is_last:
            self._here[index, micro] = results

    def _call(
        self, batch: Batch, stage: Stage, inputs: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], Sums]:
        """Run one stage on one micro batch; returns what the next one reads, and sums."""
        part, objective = self._part, self._calls.objective
        module = part.placement.forward_module()
        view = StageView(module, part.forward, stage, None if stage.is_first else inputs)
        sums = objective.loss(objective.forward(view, batch), batch)
        if view.results is None:
            raise ValueError("in a pipeline an objective must call the model")
        if not stage.is_last:
            # Each stage has its own losses, but the targets are the same ones.
            sums = replace(sums, targets=torch.zeros_like(sums.targets))
        return view.results, sums

    def _inputs(self, index: int, micro: int) -> tuple[Tensor, ...]:
        if index == 0:
            return ()
        key = index - 1, micro
        if key in self._arriving:
            arrived = self._arriving.pop(key)
            tensors = arrived.wait()
            flags = [each.has_gradient for each in arrived.specs]
        else:
            tensors = self._here.pop(key)
            flags = [each.requires_grad for each in tensors]
        return tuple(
            each.detach().requires_grad_(flag) for each, flag in zip(tensors, flags, strict=True)
        )

    def _backward(self, step: Action, *, is_last: bool) -> None:
        key, placement = (step.stage, step.micro), self._part.placement
        kept = self._passes[key]
        # Without inputs there is nothing to do before the parameters.
        whole = step.kind == Kind.BACKWARD or not any(e.requires_grad for e in kept.inputs)
        if step.kind == Kind.BACKWARD_WEIGHT and not whole:
            placement.begin(is_last=is_last)
            placement.backward(WeightsPass(kept, self._parameters))  # type: ignore[arg-type] # stands for a loss
            del self._passes[key]
            return
        if step.kind == Kind.BACKWARD_INPUT and whole:
            if step.stage > 0:
                self._gradients[step.stage - 1, step.micro] = []
            return
        root = kept.root(self._output_gradients(*key))
        if whole:
            placement.begin(is_last=is_last)
            placement.backward(root)
            del self._passes[key]
        else:
            backward_input(kept, root, self._parameters)
        if step.stage > 0 and step.kind != Kind.BACKWARD_WEIGHT:
            self._gradients[step.stage - 1, step.micro] = kept.input_gradients()

    def _output_gradients(self, index: int, micro: int) -> Sequence[Tensor]:
        if self._part.stages[index].is_last:
            return ()
        if (index, micro) in self._arriving:
            return self._arriving.pop((index, micro)).wait()
        return self._gradients.pop((index, micro))

"""The seam between the loop and devices, and its implementation for one device."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lme_core.training.gradients import clip, global_norm
from lme_core.training.objectives import Batch, LossSum, LossTerm, Objective
from lme_core.training.precision import LossScaler, MasterWeights


@dataclass(frozen=True, slots=True)
class StepSums:
    """What one step's passes gave, over all micro batches and replicas, on the device."""

    loss: Tensor
    """What was minimised, 0-d."""
    values: Mapping[str, Tensor]
    """Means by name, `lm_loss` in nats per target and every further loss, 0-d each; and statistics
    of the model, of any shape."""
    targets: Tensor
    """Number of targets, 0-d."""


class Runtime(Protocol):
    """How a model runs on its devices. No method but `state_dict` waits for a device."""

    @property
    def device(self) -> torch.device:
        """Where batches go and results lie."""
        ...

    def named_parameters(self) -> Mapping[str, Parameter]:
        """Return the trainables that the optimizer updates, in fp32, by fully qualified name."""
        ...

    def named_buffers(self) -> Mapping[str, Tensor]:
        """Return the buffers that belong to the model's state."""
        ...

    def forward_backward(self, objective: Objective, batches: Sequence[Batch]) -> StepSums:
        """Leave the gradients of the mean loss over all `batches` of all replicas.

        Sums are divided by global counts, so that the result does not depend on how a step is cut
        into micro batches or spread over replicas.
        """
        ...

    def forward(self, objective: Objective, batch: Batch) -> LossSum:
        """Return a batch's sums over all replicas, without gradient and without dropout."""
        ...

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Scale gradients to a global norm of at most `max_norm` and return the norm before.

        A norm that is not finite means that the step must be skipped.
        """
        ...

    def reduce(self, tensor: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """Combine a tensor over replicas. One on the host does not wait for the device."""
        ...

    def finish_step(self) -> None:
        """Let the model compute with the updated parameters, and drop the gradients."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides tensors, fit for JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        ...


def denominators(objective: Objective, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Add up what a step's sums are divided by.

    Args:
        objective: Which counts.
        batches: All micro batches of a step.

    Returns:
        Counts by name, 0-d.
    """
    counts: dict[str, Tensor] = {}
    for batch in batches:
        for name, count in objective.counts(batch).items():
            counts[name] = counts[name] + count if name in counts else count
    return counts


def mean_losses(sums: LossSum, counts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Divide sums by counts.

    Args:
        sums: Of any part of a step.
        counts: Of the whole step, over all replicas. A count of 0 divides as 1.

    Returns:
        The minimised loss, and the means by name with `lm_loss` among them.
    """
    loss = sums.total / counts["targets"].clamp(min=1)
    values = {"lm_loss": loss}
    for name, term in sums.extras.items():
        mean = term.total / counts[term.per].clamp(min=1)
        values[name] = mean
        if term.weight:
            loss = loss + term.weight * mean
    return loss, values


def add_sums(left: LossSum | None, right: LossSum) -> LossSum:
    """Add the sums of two batches, detached from their graphs.

    Args:
        left: So far; nothing at first.
        right: Of the next batch.

    Returns:
        Their sum.
    """
    extras = {
        name: LossTerm(term.total.detach(), term.per, term.weight)
        for name, term in right.extras.items()
    }
    if left is None:
        return LossSum(right.total.detach(), right.targets, extras)
    return LossSum(
        left.total + right.total.detach(),
        left.targets + right.targets,
        {
            name: LossTerm(left.extras[name].total + term.total, term.per, term.weight)
            for name, term in extras.items()
        },
    )


class SingleDevice:
    """A whole model on one device."""

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Place a model.

        Args:
            model: Built on any device. One on meta is initialised by its own `initial_value`.
            device: Where it runs; the CPU by default.
            dtype: In which the model computes: torch.float32, torch.bfloat16 or torch.float16 (or
                torch.float64 for a model that has it already). With the 16-bit ones fp32 master
                weights are kept, and fp16 has a loss scaler.
        """
        self.device = torch.device("cpu" if device is None else device)
        self._model = materialize(model, self.device)
        low = dtype in (torch.bfloat16, torch.float16)
        self._masters = MasterWeights(self._model, dtype) if low else None
        self._scaler = LossScaler(self.device) if dtype == torch.float16 else None
        self._parameters = (
            dict(self._model.named_parameters())
            if self._masters is None
            else self._masters.named_parameters()
        )

    def named_parameters(self) -> Mapping[str, Parameter]:
        """Return the parameters, or their fp32 masters."""
        return self._parameters

    def named_buffers(self) -> Mapping[str, Tensor]:
        """Return the persistent buffers."""
        saved = self._model.state_dict(keep_vars=True).keys()
        return {name: b for name, b in self._model.named_buffers() if name in saved}

    def forward_backward(self, objective: Objective, batches: Sequence[Batch]) -> StepSums:
        """Run the micro batches one after the other, adding gradients up in fp32."""
        self._drop_gradients()
        counts = denominators(objective, batches)
        sums: LossSum | None = None
        for batch in batches:
            micro = objective.loss(objective.forward(self._model, batch), batch)
            loss, _ = mean_losses(micro, counts)
            if self._scaler is not None:
                loss = self._scaler.scale(loss)
            loss.backward()
            if self._masters is not None:
                self._masters.collect_gradients()
            sums = add_sums(sums, micro)
        if sums is None:
            raise ValueError("a step needs at least one micro batch")
        loss, values = mean_losses(sums, counts)
        return StepSums(loss, values, sums.targets)

    @torch.no_grad()
    def forward(self, objective: Objective, batch: Batch) -> LossSum:
        """Run one batch in evaluation mode."""
        with _evaluating(self._model):
            return add_sums(None, objective.loss(objective.forward(self._model, batch), batch))

    @torch.no_grad()
    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Unscale, measure and clip in one pass over the gradients."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = global_norm(gradients).to(self.device)
        coefficient = None
        if self._scaler is not None:
            coefficient = self._scaler.inverse()
            norm = norm * coefficient
            self._scaler.update(~torch.isfinite(norm))
        if max_norm is not None:
            # As torch does it: 1e-6 keeps a norm of 0 from dividing.
            shrink = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            coefficient = shrink if coefficient is None else coefficient * shrink
        if coefficient is not None:
            clip(gradients, coefficient)
        return norm

    def reduce(self, tensor: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """Return the tensor: there is one replica."""
        return tensor

    def finish_step(self) -> None:
        """Refresh the low-precision copies and drop the gradients."""
        self._drop_gradients()
        if self._masters is not None:
            self._masters.refresh()

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale, if there is one."""
        return {} if self._scaler is None else {"loss_scale": self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved loss scale; one saved by a run of another dtype is left aside."""
        if self._scaler is not None and "loss_scale" in state:
            self._scaler.load_state_dict(state["loss_scale"])

    def _drop_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None


def materialize(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device; give one without memory its initial values.

    Args:
        model: Whole, or on meta with an `initial_value(name, region)` method.
        device: Where to.

    Returns:
        The same model.

    Raises:
        ValueError: If it is on meta and has no initial values.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        return model.to(device)
    if not isinstance(model, _HasInitialValues):
        raise ValueError("a model on meta needs an `initial_value(name, region)` method")
    # Not `to_empty`: it gives shared parameters separate memory.
    made: dict[int, Tensor] = {}
    with torch.no_grad():
        for prefix, module in model.named_modules():
            for name, old in [*module.named_parameters(prefix, recurse=False)]:
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    new.copy_(model.initial_value(name, None))
                    made[id(old)] = Parameter(new, requires_grad=old.requires_grad)
                setattr(module, name.rpartition(".")[2], made[id(old)])
            for name, old in [*module.named_buffers(prefix, recurse=False)]:
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    made[id(old)] = new.copy_(model.initial_value(name, None))
                setattr(module, name.rpartition(".")[2], made[id(old)])
    return model


@runtime_checkable
class _HasInitialValues(Protocol):
    def initial_value(self, name: str, region: tuple[slice, ...] | None) -> Tensor: ...


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)

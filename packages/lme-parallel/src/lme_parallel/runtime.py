"""One training step over any layout: gradients of the globally normalised loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lme_parallel.gradients import global_norm, scale_gradients

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class StepSums:
    """What one step computed, global over ranks and micro batches, left on the device."""

    loss: Tensor
    """What was minimised, 0-d."""
    values: Mapping[str, Tensor]
    """`lm_loss`, the mean loss per target, and one entry for each further term, 0-d."""
    targets: Tensor
    """Targets in the global batch, 0-d."""


class Objective(Protocol):
    """What is minimised, as sums that the runtime divides by global counts."""

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return what sums are divided by: `targets`, `sequences`, ..., each 0-d."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> Any:  # outputs are the objective's own
        """Run the model."""
        ...

    def loss(self, outputs: Any, batch: Batch) -> Any:  # has `total`, `targets` and `extras`
        """Return sums over the batch."""
        ...


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


class Scaler(Protocol):
    """Scale of an fp16 loss, adjusted to what overflows."""

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the scale."""
        ...

    def inverse(self) -> Tensor:
        """Return one over the scale, 0-d."""
        ...

    def update(self, found_inf: Tensor) -> None:
        """Adjust the scale to whether a step's gradients overflowed, 0-d bool."""
        ...

    def state_dict(self) -> dict[str, Any]:  # JSON
        """Return the scale and its counters."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        ...


class DistributedRuntime:
    """Runs objectives over a model that `parallelize` prepared.

    Args:
        model: Whole, materialised, on `device`.
        device: Where batches go.
        masters: fp32 parameters, where the model's own are lower.
        scaler: Loss scale, for fp16.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        masters: Masters | None = None,
        scaler: Scaler | None = None,
    ) -> None:
        self.device = device
        self.model = model
        self._masters = masters
        self._scaler = scaler
        named = model.named_parameters() if masters is None else masters.named_parameters().items()
        self._parameters = dict(named)

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the fp32 parameters by name, frozen ones too, as they are saved as well."""
        return self._parameters

    def named_buffers(self) -> Mapping[str, Tensor]:
        """Return the buffers that are saved with the model, by name."""
        return {
            name: each for name, each in self.model.named_buffers() if _is_saved(self.model, name)
        }

    def forward_backward(self, objective: Objective, batches: Sequence[Batch]) -> StepSums:
        """Leave the gradients of the globally normalised loss on `named_parameters()`.

        Args:
            objective: What is minimised.
            batches: Micro batches of one step; moved to the device.

        Returns:
            Sums of the step, still on the device.

        Raises:
            ValueError: If there is no batch.
        """
        if not batches:
            raise ValueError("a step needs at least one micro batch, got none")
        batches = [self._to_device(batch) for batch in batches]
        counts = self._global_counts([objective.counts(batch) for batch in batches])
        self._drop_gradients()
        sums = _RunningSums()
        for batch in batches:
            micro = objective.loss(objective.forward(self.model, batch), batch)
            loss = _mean_loss(micro, counts)
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()
            if self._masters is not None:
                self._masters.collect_gradients()
            sums.add(micro)
        return sums.finish(counts)

    def forward(self, objective: Objective, batch: Batch) -> Any:  # the objective's LossSum
        """Evaluate one batch without gradients; the sums are global."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                batch = self._to_device(batch)
                return objective.loss(objective.forward(self.model, batch), batch)
        finally:
            self.model.train(training)

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Clip by the global norm and return it, 0-d; not finite means: skip the step.

        Args:
            max_norm: Largest allowed norm; `None` only measures.
        """
        gradients = [each.grad for each in self._parameters.values() if each.grad is not None]
        norm = global_norm(gradients).to(self.device)
        factor: Tensor | None = None
        if self._scaler is not None:
            factor = self._scaler.inverse()
            norm = norm * factor
            self._scaler.update(~torch.isfinite(norm))
        if max_norm is not None:
            # The small number keeps a norm of zero from dividing, as in torch's own clipping.
            shrink = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            factor = shrink if factor is None else factor * shrink
        if factor is not None:
            scale_gradients(gradients, factor)
        return norm

    def reduce(self, tensor: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """Reduce over the data-parallel ranks; one process has nothing to reduce."""
        if op not in ("sum", "max"):
            raise ValueError(f"`op` must be `sum` or `max`, got {op!r}")
        return tensor

    def finish_step(self) -> None:
        """Copy updated fp32 parameters into a lower-precision model and drop the gradients."""
        self._drop_gradients()
        if self._masters is not None:
            self._masters.refresh()

    def state_dict(self) -> dict[str, Any]:  # JSON
        """Return the loss scale, where there is one."""
        return {} if self._scaler is None else {"loss_scale": self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        if self._scaler is not None and "loss_scale" in state:
            self._scaler.load_state_dict(state["loss_scale"])

    def _drop_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def _to_device(self, batch: Batch) -> Batch:
        return {name: each.to(self.device, non_blocking=True) for name, each in batch.items()}

    def _global_counts(self, counts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for each in counts:
            for name, count in each.items():
                totals[name] = totals[name] + count if name in totals else count
        # A batch without targets has a loss of 0, not of 0/0.
        return {
            name: self.reduce(total.to(self.device), "sum").clamp(min=1)
            for name, total in totals.items()
        }


class _RunningSums:
    """Sums of the micro batches of a step."""

    def __init__(self) -> None:
        self._targets: Tensor | int = 0
        # Name to sum, the count it is divided by, and its weight in the loss.
        self._terms: dict[str, tuple[Tensor, str, float]] = {}

    def add(self, sums: Any) -> None:  # the objective's LossSum
        self._targets = self._targets + sums.targets
        self._add("lm_loss", sums.total, "targets", 1.0)
        for name, term in sums.extras.items():
            self._add(name, term.total, term.per, term.weight)

    def finish(self, counts: Mapping[str, Tensor]) -> StepSums:
        values = {name: total / counts[per] for name, (total, per, _) in self._terms.items()}
        loss = values["lm_loss"]
        for name, (_, _, weight) in self._terms.items():
            if name != "lm_loss" and weight:
                loss = loss + weight * values[name]
        return StepSums(loss=loss, values=values, targets=torch.as_tensor(self._targets))

    def _add(self, name: str, total: Tensor, per: str, weight: float) -> None:
        total = total.detach()
        if name in self._terms:
            total = self._terms[name][0] + total
        self._terms[name] = (total, per, weight)


def _mean_loss(sums: Any, counts: Mapping[str, Tensor]) -> Tensor:  # the objective's LossSum
    loss = sums.total / counts["targets"]
    for term in sums.extras.values():
        # A term that is only logged must not put its infinities into the gradient.
        if term.weight:
            loss = loss + term.weight * (term.total / counts[term.per])
    return loss


def _is_saved(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf not in model.get_submodule(owner)._non_persistent_buffers_set

"""One training step over any layout: gradients of the globally normalised loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lme_parallel.gradients import global_norm, scale_gradients
from lme_parallel.placement import Placement, drop_gradients
from lme_parallel.shards import Shard

if TYPE_CHECKING:
    from lme_parallel.mesh import Mesh
    from lme_parallel.pipeline.setup import Pipeline
    from lme_parallel.pipeline.sums import StageSums

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
        model: Materialised, as far as this process holds it.
        placement: Where its parameters are.
        device: Where batches go.
        mesh: The processes; `None` for one process.
        scaler: Loss scale, for fp16.
        prepare: Changes each batch on its device before anything sees it.
        pipeline: The stages that are here; `None`: the model is whole.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        *,
        device: torch.device,
        mesh: "Mesh | None" = None,
        scaler: Scaler | None = None,
        prepare: Callable[[Batch], Batch] | None = None,
        pipeline: "Pipeline | None" = None,
    ) -> None:
        self.device = device
        self.model = model
        self._placement = placement
        self._mesh = mesh
        self._scaler = scaler
        self._prepare = prepare
        self._pipeline = pipeline
        self._parameters = placement.named_parameters()
        self.mark: Callable[[str], None] = ignore_phase
        """Called where a step enters another phase, for a watchdog; may be replaced."""

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters by name, at least fp32, frozen ones too, as they are saved as well.

        Of a parameter that is cut over processes it is the local part; `shards` says which.
        """
        return self._parameters

    def shards(self) -> Mapping[str, Shard]:
        """Return which part of each parameter is here."""
        return self._placement.shards()

    def named_buffers(self) -> Mapping[str, Tensor]:
        """Return the buffers that are saved with the model, by name."""
        return self._placement.named_buffers()

    def forward_backward(self, objective: Objective, batches: Sequence[Batch]) -> StepSums:
        """Leave the gradients of the globally normalised loss on `named_parameters()`.

        Args:
            objective: What is minimised.
            batches: This process's micro batches of one step, as many as any other's; moved to
                the device.

        Returns:
            Sums of the step over all processes, still on the device.

        Raises:
            ValueError: If there is no batch, or a pipeline cannot run so many.
        """
        if not batches:
            raise ValueError("a step needs at least one micro batch, got none")
        if self._pipeline is not None:
            self._pipeline.runner.check(len(batches))
        batches = [self._to_device(batch) for batch in batches]
        counts = self._global_counts([objective.counts(batch) for batch in batches])
        drop_gradients(self._parameters)
        sums = _RunningSums()
        if self._pipeline is None:
            self._run_micro_batches(objective, batches, counts, sums)
        else:
            self._run_pipeline(self._pipeline, objective, batches, counts, sums)
        self._placement.finish()
        return sums.finish(counts, self._sum)

    def forward(self, objective: Objective, batch: Batch) -> Any:  # the objective's LossSum
        """Evaluate one batch without gradients; the sums are over all processes."""
        self.mark("evaluation")
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                batch = self._to_device(batch)
                if self._pipeline is not None:
                    return self._evaluate_pipeline(self._pipeline, objective, batch)
                outputs = objective.forward(self._placement.forward_module(), batch)
                return self._sum_over_processes(objective.loss(outputs, batch))
        finally:
            self.model.train(training)

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Clip by the global norm and return it, 0-d; not finite means: skip the step.

        Args:
            max_norm: Largest allowed norm; `None` only measures.
        """
        self.mark("clip")
        named = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        norm = self._global_norm(named)
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
            scale_gradients(list(named.values()), factor)
        return norm

    def reduce(self, tensor: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """Combine a tensor over processes: `sum` over those with other rows, `max` over all."""
        if op not in ("sum", "max"):
            raise ValueError(f"`op` must be `sum` or `max`, got {op!r}")
        if self._mesh is None:
            return tensor
        return self._mesh.reduce(tensor, op)

    def finish_step(self) -> None:
        """Let the model compute with updated parameters and drop the gradients."""
        self._placement.refresh()

    def state_dict(self) -> dict[str, Any]:  # JSON
        """Return the loss scale, where there is one."""
        return {} if self._scaler is None else {"loss_scale": self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        if self._scaler is not None and "loss_scale" in state:
            self._scaler.load_state_dict(state["loss_scale"])

    def _run_micro_batches(
        self,
        objective: Objective,
        batches: Sequence[Batch],
        counts: Mapping[str, Tensor],
        sums: "_RunningSums",
    ) -> None:
        module = self._placement.forward_module()
        for number, batch in enumerate(batches, start=1):
            self._placement.begin(is_last=number == len(batches))
            self.mark("forward")
            micro = objective.loss(objective.forward(module, batch), batch)
            loss = self._scaled(_mean_loss(micro, counts))
            self.mark("backward")
            self._placement.backward(loss)
            sums.add(micro)

    def _run_pipeline(
        self,
        pipeline: "Pipeline",
        objective: Objective,
        batches: Sequence[Batch],
        counts: Mapping[str, Tensor],
        sums: "_RunningSums",
    ) -> None:
        from lme_parallel.pipeline.run import StepCalls  # noqa: PLC0415 (for the axis in use)

        def loss(micro: Any) -> Tensor:  # the objective's LossSum
            return self._scaled(_mean_loss(micro, counts))

        pipeline.runner.train(batches, StepCalls(objective, loss, sums.add, self.mark))
        sums.add_stages(pipeline.sums)

    def _evaluate_pipeline(
        self, pipeline: "Pipeline", objective: Objective, batch: Batch
    ) -> Any:  # the objective's LossSum
        stages = pipeline.runner.evaluate(objective, batch)
        return self._sum_over_processes(pipeline.sums.merge(stages))

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self._scaler is None else self._scaler.scale(loss)

    def _to_device(self, batch: Batch) -> Batch:
        moved = {name: each.to(self.device, non_blocking=True) for name, each in batch.items()}
        return moved if self._prepare is None else self._prepare(moved)

    def _global_counts(self, counts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for each in counts:
            for name, count in each.items():
                totals[name] = totals[name] + count if name in totals else count
        summed = self._sum([total.to(self.device) for total in totals.values()])
        # A batch without targets has a loss of 0, not of 0/0.
        return {name: each.clamp(min=1) for name, each in zip(totals, summed, strict=True)}

    def _global_norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        if self._mesh is None:
            return global_norm(list(gradients.values())).to(self.device)
        # Each element counts once, whoever holds copies of it.
        shards = self._placement.shards()
        owned = [each for name, each in gradients.items() if shards[name].is_owner]
        wide = global_norm(owned, keep_wide=True).to(self.device)
        norm = self._mesh.sum_over_all(wide.square()).sqrt()
        dtype = next((each.dtype for each in gradients.values()), torch.float32)
        return norm.to(dtype)

    def _sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors) if self._mesh is None else self._mesh.sum_together(tensors)

    def _sum_over_processes(self, sums: Any) -> Any:  # the objective's LossSum
        if self._mesh is None:
            return sums
        names = list(sums.extras)
        parts = [sums.total, sums.targets, *(sums.extras[name].total for name in names)]
        total, targets, *rest = self._sum([each.to(self.device) for each in parts])
        extras = {
            name: replace(sums.extras[name], total=each)
            for name, each in zip(names, rest, strict=True)
        }
        return replace(sums, total=total, targets=targets, extras=extras)


def ignore_phase(phase: str) -> None:
    """Take note of nothing: there is no watchdog."""


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

    def add_stages(self, stages: "StageSums") -> None:
        """Complete the sums of the stages that are here to those of all stages."""
        self._targets, self._terms = stages.complete(self._targets, self._terms)

    def finish(
        self, counts: Mapping[str, Tensor], add_up: Callable[[Sequence[Tensor]], list[Tensor]]
    ) -> StepSums:
        totals = [total for total, _, _ in self._terms.values()]
        targets, *totals = add_up(
            [torch.as_tensor(self._targets, device=totals[0].device), *totals]
        )
        values = {
            name: total / counts[per]
            for total, (name, (_, per, _)) in zip(totals, self._terms.items(), strict=True)
        }
        loss = values["lm_loss"]
        for name, (_, _, weight) in self._terms.items():
            if name != "lm_loss" and weight:
                loss = loss + weight * values[name]
        return StepSums(loss=loss, values=values, targets=targets)

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

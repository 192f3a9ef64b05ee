"""Evaluation: the mean loss over the same batches every time."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lme_core.training.batches import Batch, to_device
from lme_core.training.objectives import LossSum, Objective
from lme_core.training.runtime import Runtime, add_sums


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """What is evaluated on and how it is named."""

    context: Literal["val", "test"]
    """Split."""
    batches: Iterable[Batch]
    """This replica's batches on the host: finite, and the same whenever gone through."""
    group: str | None = None
    """Name of the data set, where there are several."""
    bytes_per_target: float | None = None
    """Mean bytes of text per target token; none if unknown."""


def evaluate(runtime: Runtime, objective: Objective, chosen: EvaluationSet) -> dict[str, Any]:
    """Measure the mean negative log likelihood per target over an evaluation set.

    Nothing that training reads is changed.

    Args:
        runtime: The model on its devices.
        objective: Of the run.
        chosen: The set.

    Returns:
        `loss` in nats per target, and `bits_per_byte` where the bytes are known.

    Raises:
        ValueError: If the set has no batches.
    """
    sums: LossSum | None = None
    for batch in chosen.batches:
        sums = add_sums(sums, runtime.forward(objective, to_device(batch, runtime.device)))
    if sums is None:
        raise ValueError(f"the {chosen.context} split of `{chosen.group}` has no batches")
    # Divided on the host in float64: the only place that waits for the device.
    loss = sums.total.item() / max(sums.targets.item(), 1)
    result: dict[str, Any] = {"loss": loss}
    if chosen.bytes_per_target is not None:
        result["bits_per_byte"] = loss / math.log(2) / chosen.bytes_per_target
    return result


def records(
    runtime: Runtime,
    objective: Objective,
    sets: Sequence[EvaluationSet],
    *,
    step: int,
    tokens: int,
) -> list[dict[str, Any]]:
    """Evaluate several sets and write each result as a record for trackers.

    Args:
        runtime: The model on its devices.
        objective: Of the run.
        sets: Evaluated in order.
        step: Optimizer steps done.
        tokens: Tokens trained on.

    Returns:
        One record a set.
    """
    return [
        {
            "context": chosen.context,
            "group": chosen.group,
            "step": step,
            "tokens": tokens,
            **evaluate(runtime, objective, chosen),
        }
        for chosen in sets
    ]

"""Steps whose loss or gradient is not finite, or jumps: not applied, recorded, perhaps fatal."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Policy = Literal["skip", "raise"]

logger = logging.getLogger(__name__)

_DECAY = 0.98
_WARMUP = 20
"""Accepted steps before a loss can count as a spike."""


class BadStepError(RuntimeError):
    """A step's loss or gradient was not finite, or jumped, and the run was told to end then."""


@dataclass(frozen=True, slots=True)
class _Step:
    step: int
    loss: Tensor
    grad_norm: Tensor
    is_bad: Tensor
    position: Mapping[str, Any]
    tokens: list[Tensor]


class StepGuard:
    """Decides on the device which steps are applied, and tells about them when somebody looks.

    It sees values that are already summed over all replicas, so that all decide alike. Nothing
    waits for the device but `report`, which is called where the loop waits anyway.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        spike_sigmas: float | None,
        record_path: Path,
        device: torch.device,
        scales_loss: bool = False,
    ) -> None:
        """Start without a history.

        Args:
            policy: What follows a bad step, which is never applied: `skip` goes on, `raise` ends
                the run at the next look.
            spike_sigmas: A loss so many standard deviations above the running mean is bad too;
                `None`: only values that are not finite.
            record_path: JSON lines with the step, its loss and its batch; one file a replica.
            device: Of the losses.
            scales_loss: Whether a gradient that overflows is a matter of the loss scale, not of
                the batch.
        """
        self._policy: Policy = policy
        self._sigmas = spike_sigmas
        self._path = record_path
        self._scales_loss = scales_loss
        # Accepted steps, running mean and mean square of their losses.
        self._history = torch.zeros(3, dtype=torch.float64, device=device)
        self._steps: list[_Step] = []

    def judge(
        self,
        step: int,
        loss: Tensor,
        grad_norm: Tensor,
        micro_batches: Sequence[Mapping[str, Tensor]],
        position: Mapping[str, Any],
    ) -> Tensor:
        """Decide about a step.

        Args:
            step: Its number, from 1.
            loss: What was minimised, over all replicas, 0-d.
            grad_norm: Over all replicas, 0-d.
            micro_batches: This replica's.
            position: Of the data before the step.

        Returns:
            The norm, infinite if the step must not be applied; still on the device.
        """
        is_bad = ~torch.isfinite(loss)
        if self._sigmas is not None:
            count, mean, square = self._history.unbind()
            value = loss.detach().double()
            spread = (square - mean.square()).clamp(min=0).sqrt()
            is_bad = is_bad | ((count >= _WARMUP) & (value > mean + self._sigmas * spread))
            weight = torch.where(count > 0, 1 - _DECAY, 1.0)
            one = torch.ones_like(count)
            seen = torch.stack([count + 1, value, value.square()])
            rate = torch.stack([one, weight, weight])
            accepted = torch.lerp(self._history, seen, rate)
            is_accepted = ~(is_bad | ~torch.isfinite(grad_norm))
            self._history = torch.where(is_accepted, accepted, self._history)
        decided = torch.where(is_bad, torch.full_like(grad_norm, math.inf), grad_norm)
        if not self._scales_loss:
            is_bad = is_bad | ~torch.isfinite(grad_norm)
        tokens = [batch["input_ids"] for batch in micro_batches]
        self._steps.append(_Step(step, loss.detach(), grad_norm, is_bad, position, tokens))
        return decided

    def report(self) -> None:
        """Write down the bad steps since the last look.

        Raises:
            BadStepError: If there are any and the policy is `raise`.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        flags = torch.stack([each.is_bad for each in steps]).tolist()
        bad = [each for each, is_bad in zip(steps, flags, strict=True) if is_bad]
        if not bad:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            for each in bad:
                file.write(json.dumps(_record(each, self._policy)) + "\n")
        numbers = ", ".join(str(each.step) for each in bad)
        why = f"loss {float(bad[0].loss):.4g}, gradient norm {float(bad[0].grad_norm):.4g}"
        if self._policy == "raise":
            raise BadStepError(
                f"step {numbers} gave values that are not finite or jumped ({why}) and was not"
                f" applied; its batch is in {self._path}. Set"
                " `training_parameters.bad_step_policy: skip` to leave such batches out and go on"
            )
        logger.warning("updates skipped: steps=%s %s record=%s", numbers, why, self._path)

    def state_dict(self) -> dict[str, Any]:
        """Return the history of losses."""
        return {"history": self._history.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved history."""
        if "history" in state:
            self._history = torch.tensor(
                state["history"], dtype=torch.float64, device=self._history.device
            )


def _record(each: _Step, policy: Policy) -> dict[str, Any]:
    # JSON has no numbers that are not finite.
    return {
        "step": each.step,
        "policy": policy,
        "loss": str(float(each.loss)),
        "grad_norm": str(float(each.grad_norm)),
        "data_position_before": dict(each.position),
        "tokens_blake2b": [
            hashlib.blake2b(batch.cpu().numpy().tobytes(), digest_size=16).hexdigest()
            for batch in each.tokens
        ],
    }

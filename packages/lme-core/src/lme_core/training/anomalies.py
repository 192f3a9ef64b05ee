"""Steps whose loss or gradient is not finite, or jumps: left out, gone back from, or fatal."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Policy = Literal["skip", "raise", "rewind"]

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
    following: Mapping[str, Any]
    tokens: list[Tensor]


class StepGuard:
    """Decides on the device which steps are applied, and tells about them when somebody looks.

    It sees values that are already summed over all replicas, so that all decide alike. Nothing
    waits for the device but `report`, which is called where the loop waits anyway.

    To go back is asked for by `report` and done by its caller: it gives the data position to go on
    at, behind the last bad step's batch, and the caller restores the rest, this guard's state
    included.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        spike_sigmas: float | None,
        record_path: Path,
        device: torch.device,
        scales_loss: bool = False,
        max_rewinds: int = 3,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Start without a history.

        Args:
            policy: What follows a bad step, which is never applied: `skip` goes on, `raise` ends
                the run at the next look, `rewind` asks there to go back.
            spike_sigmas: A loss so many standard deviations above the running mean is bad too;
                `None`: only values that are not finite.
            record_path: JSON lines with the step, its loss and its batch; one file a replica.
            device: Of the losses.
            scales_loss: Whether a gradient that overflows is a matter of the loss scale, not of
                the batch.
            max_rewinds: How often a run may go back; a bad step after that ends it.
            reduce: The largest of a tensor's values over all replicas, on the host, so that none
                goes back alone; `None`: there is one.
        """
        self._policy: Policy = policy
        self._sigmas = spike_sigmas
        self._path = record_path
        self._scales_loss = scales_loss
        self._max_rewinds = max_rewinds
        self._rewinds = 0
        self._reduce = reduce
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
        following: Mapping[str, Any],
    ) -> Tensor:
        """Decide about a step.

        Args:
            step: Its number, from 1.
            loss: What was minimised, over all replicas, 0-d.
            grad_norm: Over all replicas, 0-d.
            micro_batches: This replica's.
            position: Of the data before the step.
            following: Of the data after it.

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
        self._steps.append(
            _Step(step, loss.detach(), grad_norm, is_bad, position, following, tokens)
        )
        return decided

    def report(self) -> Mapping[str, Any] | None:
        """Write down the bad steps since the last look; all replicas call this at the same step.

        Returns:
            Where to go on in the data if the run must go back first; `None` if it need not.

        Raises:
            BadStepError: If there are any and the policy is `raise`, or `rewind` and the run went
                back too often.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return None
        flags = torch.stack([each.is_bad for each in steps]).float().cpu()
        if self._reduce is not None:
            flags = self._reduce(flags)
        bad = [each for each, is_bad in zip(steps, flags.tolist(), strict=True) if is_bad]
        if not bad:
            return None
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
        if self._policy == "rewind":
            if self._rewinds >= self._max_rewinds:
                raise BadStepError(
                    f"step {numbers} gave values that are not finite or jumped ({why}) after the"
                    f" run went back `training_parameters.max_rewinds` {self._max_rewinds} times;"
                    f" its batch is in {self._path}, and a lower learning rate or other data may"
                    " help where a larger `max_rewinds` does not"
                )
            self._rewinds += 1
            return bad[-1].following
        logger.warning("updates skipped: steps=%s %s record=%s", numbers, why, self._path)
        return None

    def record_rewind(self, before: int, after: int, position: Mapping[str, Any]) -> None:
        """Write down that the run went back.

        Args:
            before: Optimizer steps done before that.
            after: Optimizer steps done in what it went back to.
            position: Where the data goes on.
        """
        content = {
            "rewound_from": before,
            "rewound_to": after,
            "rewinds": self._rewinds,
            "data_position": dict(position),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
        logger.warning(
            "went back: from_step=%d to_step=%d rewinds=%d of=%d record=%s",
            before,
            after,
            self._rewinds,
            self._max_rewinds,
            self._path,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the history of losses, and how often the run went back."""
        return {"history": self._history.tolist(), "rewinds": self._rewinds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved history; how often this run went back is never forgotten."""
        self._rewinds = max(self._rewinds, int(state.get("rewinds", 0)))
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

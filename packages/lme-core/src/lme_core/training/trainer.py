"""The training loop: one step after another, and what happens between them."""

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lme_core.training.anomalies import StepGuard
from lme_core.training.batches import BatchStream
from lme_core.training.experts import ExpertBalance, expert_metrics
from lme_core.training.objectives import Objective
from lme_core.training.optimizers import step_optimizer
from lme_core.training.runtime import Runtime
from lme_core.training.schedules import Schedule


@dataclass(slots=True)
class TrainState:
    """How far a run is: all that changes in it besides tensors, positions and rates."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on, over all replicas."""
    stop_reason: str | None = None
    """Set by whoever wants the run to end after this step; not saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step did. Tensors are on the device: reading one waits for the step."""

    loss: Tensor
    """What was minimised, 0-d."""
    values: Mapping[str, Tensor]
    """Means by name, `lm_loss` among them, 0-d each."""
    targets: Tensor
    """Number of targets, 0-d."""
    grad_norm: Tensor
    """Global gradient norm before clipping, 0-d; if not finite the update was skipped."""
    learning_rate: float
    """Of this step's update, in the first parameter group."""
    tokens: int
    """Tokens in this step."""
    started: float
    """`time.perf_counter()` at the start of the step."""
    data_wait_seconds: float
    """How long the step waited for its batches."""
    is_last: bool
    """Whether the run's last step is done."""


class Hook(Protocol):
    """Something that happens after each step, in the order of the trainer's list."""

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Act, or find that it is not due."""
        ...


@runtime_checkable
class Closeable(Protocol):
    """A hook that holds something: it is closed when the loop ends, however it ends."""

    def close(self) -> None:
        """Let go."""
        ...


@runtime_checkable
class Named(Protocol):
    """A hook whose work has a name that a watchdog may tell."""

    phase: str
    """Such as `checkpoint`."""


class Saver(Protocol):
    """Writes and reads training checkpoints."""

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of `state.step`, or start to; raise what an earlier write raised."""
        ...

    def restore(self, state: TrainState) -> Any:
        """Read the newest checkpoint, if there is one, into everything and into `state`."""
        ...

    def rewind(self, state: TrainState, keep: Collection[str]) -> Any:
        """Go back to the newest checkpoint within a run; what `keep` names stays as it is."""
        ...

    def wait(self) -> None:
        """Return once every write is committed; raise what one raised."""
        ...


class Trainer:
    """Runs optimizer steps and calls hooks between them."""

    def __init__(
        self,
        runtime: Runtime,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        batches: BatchStream,
        hooks: Sequence[Hook] = (),
        *,
        num_training_steps: int,
        gradient_clipping: float | None = 1.0,
        seed: int = 42,
        balance: ExpertBalance | None = None,
        mark: Callable[[str], None] | None = None,
        guard: StepGuard | None = None,
    ) -> None:
        """Put a run together; nothing happens yet.

        Args:
            runtime: The model on its devices.
            objective: What is minimised.
            optimizer: Over `runtime.named_parameters()`.
            schedule: Of the optimizer's learning rates.
            batches: Each step's micro batches.
            hooks: Called in order after each step.
            num_training_steps: Length of the run, in optimizer steps.
            gradient_clipping: Largest global gradient norm, or no clipping.
            seed: Of dropout.
            balance: What moves the biases of experts, where the model has any that move.
            guard: Decides which steps are applied; without it those of finite norm.
            mark: Told which phase begins: `data`, `optimizer`, and a hook's own.
        """
        self._runtime = runtime
        self._objective = objective
        self._optimizer = optimizer
        self._schedule = schedule
        self._batches = batches
        self._hooks = tuple(hooks)
        self._num_training_steps = num_training_steps
        self._gradient_clipping = gradient_clipping
        self._seed = seed
        self._balance = balance
        self._mark = mark or _ignore
        self._guard = guard

    def fit(self, state: TrainState) -> None:
        """Train until the last step is done or a hook sets `state.stop_reason`.

        Args:
            state: Where to start; advanced in place.

        Raises:
            ValueError: If the batches end before the last step.
        """
        # The parameters may have been restored since the model's copy of them was made.
        self._runtime.finish_step()
        try:
            while state.step < self._num_training_steps and state.stop_reason is None:
                report = self.step(state)
                done = state.step
                for hook in self._hooks:
                    self._mark(hook.phase if isinstance(hook, Named) else "between steps")
                    hook(state, report)
                    if state.step < done:
                        # It went back: the step that the others would act on is undone.
                        break
        finally:
            self._batches.close()
            for hook in self._hooks:
                if isinstance(hook, Closeable):
                    hook.close()

    def step(self, state: TrainState) -> StepReport:
        """Run one optimizer step.

        Args:
            state: Advanced in place.

        Returns:
            What it did; nothing in it was waited for.

        Raises:
            ValueError: If there are no more batches.
        """
        self._mark("data")
        started = time.perf_counter()
        position = self._batches.state_dict()
        fetched = next(self._batches, None)
        if fetched is None:
            raise ValueError(
                f"the training data ended after {state.step} of "
                f"{self._num_training_steps} steps (`training_parameters.num_training_steps`)"
            )
        key = dropout_key(self._seed, state.step, self._runtime.device)
        batches = [{**batch, "dropout_key": key} for batch in fetched.micro_batches]
        sums = self._runtime.forward_backward(self._objective, batches)
        grad_norm = self._runtime.clip_gradients(self._gradient_clipping)
        self._mark("optimizer")
        learning_rate = self._schedule.learning_rate
        decided = grad_norm
        if self._guard is not None:
            decided = self._guard.judge(
                state.step + 1,
                sums.loss,
                grad_norm,
                fetched.micro_batches,
                position,
                self._batches.state_dict(),
            )
        step_optimizer(self._optimizer, decided)
        self._runtime.finish_step()
        if self._balance is not None:
            self._balance(sums.values, torch.isfinite(decided))
        self._schedule.step()
        state.step += 1
        state.tokens += fetched.tokens
        return StepReport(
            loss=sums.loss,
            values=expert_metrics(sums.values),
            targets=sums.targets,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            tokens=fetched.tokens,
            started=started,
            data_wait_seconds=fetched.wait_seconds,
            is_last=state.step >= self._num_training_steps,
        )


def _ignore(phase: str) -> None:
    """Without a watchdog nobody asks."""


def dropout_key(seed: int, step: int, device: torch.device) -> Tensor:
    """Hash seed and step: what all dropout masks of a step derive from.

    Args:
        seed: `random_args.seed`.
        step: Optimizer steps done before.
        device: Where the key is needed.

    Returns:
        0-d int64.
    """
    digest = hashlib.blake2b(f"dropout:{seed}:{step}".encode(), digest_size=8).digest()
    key = torch.tensor(int.from_bytes(digest, "little", signed=True))
    return key.to(device, non_blocking=True)

"""What happens between steps: log, evaluate, save, stop, profile, collect garbage.

Put them in the order stop, log, evaluate, save: a run that must stop then saves at the same step,
and a step's lines of metrics are on disk before its checkpoint.
"""

import gc
import logging
import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from lme_core.training.anomalies import StepGuard
from lme_core.training.evaluation import EvaluationSet, records
from lme_core.training.objectives import Objective
from lme_core.training.rewinding import Rewinder
from lme_core.training.runtime import Runtime
from lme_core.training.throughput import Throughput, peak_memory_bytes
from lme_core.training.tracking import Tracker
from lme_core.training.trainer import Saver, StepReport, TrainState

logger = logging.getLogger(__name__)


class LogHook:
    """Gives the tracker a record of the first step, of every interval and of the last step."""

    def __init__(
        self, runtime: Runtime, tracker: Tracker, throughput: Throughput, *, interval: int
    ) -> None:
        """Say where records go.

        Args:
            runtime: For the device and the largest memory over replicas.
            tracker: Of this rank; without trackers inside on ranks that do not track.
            throughput: What measures speed.
            interval: Optimizer steps between records.
        """
        self._runtime = runtime
        self._tracker = tracker
        self._throughput = throughput
        self._interval = interval

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Read the step's numbers if a record is due; else only count its time."""
        if not (state.step == 1 or state.step % self._interval == 0 or report.is_last):
            self._throughput.add(report)
            return
        names = ["loss", *report.values, "grad_norm"]
        tensors = [report.loss, *report.values.values(), report.grad_norm]
        # One copy to the host, which waits for the step: its time is complete after it.
        numbers = torch.stack([tensor.float() for tensor in tensors]).tolist()
        self._throughput.add(report)
        memory = torch.tensor(peak_memory_bytes(self._runtime.device))
        record: dict[str, Any] = {
            "context": "train",
            "group": None,
            "step": state.step,
            "tokens": state.tokens,
            **dict(zip(names, numbers, strict=True)),
            "learning_rate": report.learning_rate,
            **self._throughput.read(),
            "peak_memory_bytes": int(self._runtime.reduce(memory, "max")),
        }
        self._tracker.log(record)
        logger.info(
            "step done: step=%d tokens=%d loss=%.4f grad_norm=%.4f learning_rate=%.3e "
            "tokens_per_second=%.0f",
            state.step,
            state.tokens,
            record["loss"],
            record["grad_norm"],
            report.learning_rate,
            record["tokens_per_second"],
        )
        if not math.isfinite(record["grad_norm"]):
            logger.warning("update skipped, gradient norm not finite: step=%d", state.step)


class GuardHook:
    """Lets the guard tell about bad steps, at the steps that others wait for anyway."""

    def __init__(
        self,
        guard: StepGuard,
        *,
        interval: int,
        save_interval: int | None = None,
        rewinder: Rewinder | None = None,
    ) -> None:
        """Say who tells how often.

        Args:
            guard: What judged the steps.
            interval: That of `LogHook`, which comes before.
            save_interval: That of `SaveHook`, so that no checkpoint lies behind a bad step that
                nobody knows of.
            rewinder: What goes back when the guard asks for it.
        """
        self._guard = guard
        self._intervals = [each for each in (interval, save_interval) if each is not None]
        self._rewinder = rewinder

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Look if it is due, before anything is evaluated or saved; may raise `BadStepError`."""
        ends = report.is_last or state.stop_reason is not None
        is_due = any(state.step % each == 0 for each in self._intervals)
        if ends or state.step == 1 or is_due:
            position = self._guard.report()
            if position is not None and self._rewinder is not None:
                self._rewinder(state, position)


class EvaluateHook:
    """Evaluates validation sets every interval and at the end, and test sets at the end."""

    phase = "evaluation"

    def __init__(
        self,
        runtime: Runtime,
        objective: Objective,
        tracker: Tracker,
        sets: Sequence[EvaluationSet],
        *,
        interval: int | None,
    ) -> None:
        """Say what is evaluated.

        Args:
            runtime: The model on its devices.
            objective: Of the run.
            tracker: Where records go.
            sets: Validation and test sets.
            interval: Optimizer steps between evaluations; none: at the end only.
        """
        self._runtime = runtime
        self._objective = objective
        self._tracker = tracker
        self._validation = [each for each in sets if each.context == "val"]
        self._test = [each for each in sets if each.context == "test"]
        self._interval = interval

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Evaluate if due; also at a step after which the run stops, as no later run would."""
        due = self._interval is not None and state.step % self._interval == 0
        if due or report.is_last:
            self.evaluate(state, self._validation)
        if report.is_last:
            self.evaluate(state, self._test)

    def evaluate(self, state: TrainState, sets: Sequence[EvaluationSet]) -> None:
        """Evaluate now.

        Args:
            state: Names the step.
            sets: What to evaluate.
        """
        for record in records(
            self._runtime, self._objective, sets, step=state.step, tokens=state.tokens
        ):
            self._tracker.log(record)
            logger.info(
                "evaluated: step=%d context=%s group=%s loss=%.4f",
                state.step,
                record["context"],
                record["group"],
                record["loss"],
            )


class SaveHook:
    """Saves every interval, after the last step, and when the run must stop."""

    phase = "checkpoint"

    def __init__(self, saver: Saver, tracker: Tracker, *, interval: int) -> None:
        """Say how saving is done.

        Args:
            saver: What writes checkpoints.
            tracker: Flushed before each, so that no line of a saved step can be lost.
            interval: Optimizer steps between checkpoints.
        """
        self._saver = saver
        self._tracker = tracker
        self._interval = interval

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Save if due; at the end, wait until it is committed."""
        ends = report.is_last or state.stop_reason is not None
        if ends or state.step % self._interval == 0:
            self._tracker.flush()
            self._saver.save(state)
        if ends:
            self._saver.wait()


class StopHook:
    """Ends the run after a step when a signal came, a file appeared or the time is up.

    All replicas agree on it. A later signal of the same kind acts as if this hook were not there;
    one that comes at once is the same request, sent by a scheduler to a launcher and to its
    processes, and passed on by the launcher.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        kill_switch: Path | None = None,
        stop_after_seconds: float | None = None,
        signals: Sequence[signal.Signals] = (signal.SIGTERM,),
        interval: int = 1,
        repeat_seconds: float = 5.0,
    ) -> None:
        """Start to listen and to count the time; signals can be heard on the main thread only.

        Args:
            runtime: Over whose replicas they agree.
            kill_switch: The file that ends the run when it exists.
            stop_after_seconds: Wall-clock budget.
            signals: What ends the run.
            interval: Optimizer steps between agreements, which cost a message on the host.
            repeat_seconds: For how long after the first a signal is the same request.
        """
        self._interval = interval
        self._runtime = runtime
        self._kill_switch = kill_switch
        self._budget = stop_after_seconds
        self._started = time.monotonic()
        self._received: float | None = None
        self._repeat_seconds = repeat_seconds
        self._previous = {each: signal.signal(each, self._receive) for each in signals}

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Ask the replicas, and set `state.stop_reason` if any of them wants to stop."""
        if state.step % self._interval:
            return
        reasons = [
            (self._received is not None, "a signal asked for it"),
            (
                self._kill_switch is not None and self._kill_switch.exists(),
                f"{self._kill_switch} exists (remove it before the next start)",
            ),
            (
                self._budget is not None and time.monotonic() - self._started >= self._budget,
                f"`training_parameters.stop_after_seconds` is {self._budget}",
            ),
        ]
        mine = torch.tensor([float(holds) for holds, _ in reasons])
        anyones = self._runtime.reduce(mine, "max").tolist()
        for holds, (_, reason) in zip(anyones, reasons, strict=True):
            if holds and state.stop_reason is None:
                state.stop_reason = reason
                logger.warning("stopping after this step: step=%d reason=%s", state.step, reason)

    def close(self) -> None:
        """Stop listening."""
        for each, previous in self._previous.items():
            signal.signal(each, signal.SIG_DFL if previous is None else previous)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received = now
        elif now - self._received >= self._repeat_seconds:
            self._hand_back(number)

    def _hand_back(self, number: int) -> None:
        # None: the handler before was not set by Python.
        previous = self._previous.pop(signal.Signals(number), None)
        signal.signal(number, signal.SIG_DFL if previous is None else previous)
        os.kill(os.getpid(), number)


class ProfileHook:
    """Writes a trace of one step, for TensorBoard or Perfetto, after some steps of warming up."""

    def __init__(self, path: Path, *, wait: int = 5, warmup: int = 5, active: int = 1) -> None:
        """Say where the trace goes.

        Args:
            path: Folder of the trace.
            wait: Steps before the profiler starts.
            warmup: Steps that are traced and thrown away.
            active: Steps that are kept.
        """
        self._remaining = wait + warmup + active
        # The first step has passed when the hook is called for the first time.
        self._profiler: torch.profiler.profile | None = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(path)),
            record_shapes=True,
            profile_memory=True,
        )
        self._profiler.start()

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Mark the end of a step."""
        if self._profiler is None:
            return
        self._profiler.step()
        self._remaining -= 1
        if self._remaining == 0:
            self.close()

    def close(self) -> None:
        """Write what was traced and stop."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


class GarbageCollectionHook:
    """Collects Python's garbage at fixed steps, so that no replica pauses alone."""

    def __init__(self, *, interval: int = 1000) -> None:
        """Take over from the automatic collector.

        Args:
            interval: Optimizer steps between collections.
        """
        self._interval = interval
        self._was_enabled = gc.isenabled()
        gc.disable()

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Collect if due."""
        if state.step % self._interval == 0:
            gc.collect()

    def close(self) -> None:
        """Hand back to the automatic collector."""
        if self._was_enabled:
            gc.enable()

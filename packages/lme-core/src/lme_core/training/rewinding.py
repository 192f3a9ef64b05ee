"""Back to the last checkpoint, and past the data that led away from it."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from lme_core.training.anomalies import StepGuard
from lme_core.training.batches import BatchStream
from lme_core.training.tracking import Trackers
from lme_core.training.trainer import Saver, TrainState


class Rewinder:
    """Puts a run back to its newest checkpoint; only the data goes on where it is told to.

    All replicas do it at the same step, as all read the same checkpoint.
    """

    def __init__(
        self,
        saver: Saver,
        batches: BatchStream,
        trackers: Trackers,
        guard: StepGuard,
        *,
        keep: Collection[str],
        mark: Callable[[str], None] | None = None,
    ) -> None:
        """Say what goes back.

        Args:
            saver: What restores; it waits for a write under way first.
            batches: The data, put to where it shall go on.
            trackers: Told which records are undone.
            guard: Writes down what was done.
            keep: Names of saved states that stay as they are: the data's, for one.
            mark: Told the phase, of a watchdog.
        """
        self._saver = saver
        self._batches = batches
        self._trackers = trackers
        self._guard = guard
        self._keep = frozenset(keep)
        self._mark = mark

    def __call__(self, state: TrainState, position: Mapping[str, Any]) -> None:
        """Go back now.

        Args:
            state: Set to the checkpoint's counters.
            position: Where the data goes on.
        """
        if self._mark is not None:
            self._mark("checkpoint")
        before = state.step
        self._saver.rewind(state, self._keep)
        self._batches.load_state_dict(position)
        self._trackers.rewind(state.step)
        self._guard.record_rewind(before, state.step, position)

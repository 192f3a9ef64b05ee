"""Where numbers over time go: the run's own JSON lines always, other trackers on request."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lme_core.training.experiment_trackers import AimTracker, WandBTracker
from lme_core.training.json_lines import JsonLines
from lme_core.training.logging_args import AimArgs, LoggingArgs, WandBArgs

__all__ = [
    "TRACKERS",
    "AimArgs",
    "AimTracker",
    "JsonLines",
    "LoggingArgs",
    "Tracker",
    "Trackers",
    "WandBArgs",
    "WandBTracker",
    "build_trackers",
]


class Tracker(Protocol):
    """Takes records: one mapping a (context, group, step), as a line of `metrics.jsonl`."""

    def start(self, step: int) -> None:
        """Open, once, after a checkpoint was restored and before the first record.

        Args:
            step: Optimizer steps done; records of later steps are taken back where that is
                possible.
        """
        ...

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one record."""
        ...

    def flush(self) -> None:
        """Make sure that no record so far can be lost."""
        ...

    def finish(self) -> None:
        """Close."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on in the same place, fit for JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a saved state, before `start`."""
        ...


@runtime_checkable
class Rewindable(Protocol):
    """A tracker that can take records back while it is open."""

    def rewind(self, step: int) -> None:
        """Take back the records of steps after `step`."""
        ...


class Trackers:
    """Several trackers fed with the same records; none at all on ranks that do not track."""

    def __init__(self, trackers: Mapping[str, Tracker] | None = None) -> None:
        """Gather trackers.

        Args:
            trackers: By the name their state is saved under.
        """
        self._trackers = dict(trackers or {})

    def start(self, step: int) -> None:
        """Open all."""
        for tracker in self._trackers.values():
            tracker.start(step)

    def log(self, record: Mapping[str, Any]) -> None:
        """Give a record to all."""
        for tracker in self._trackers.values():
            tracker.log(record)

    def rewind(self, step: int) -> None:
        """Take back the records of steps after `step` in those that can; the others repeat them."""
        for tracker in self._trackers.values():
            if isinstance(tracker, Rewindable):
                tracker.rewind(step)

    def flush(self) -> None:
        """Make the records so far last in all."""
        for tracker in self._trackers.values():
            tracker.flush()

    def finish(self) -> None:
        """Close all."""
        for tracker in self._trackers.values():
            tracker.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return the states by name."""
        return {name: tracker.state_dict() for name, tracker in self._trackers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hand out the states of the trackers that are here."""
        for name, tracker in self._trackers.items():
            if name in state:
                tracker.load_state_dict(state[name])


def _build_aim(args: LoggingArgs, config: Mapping[str, Any]) -> Tracker:
    if args.aim_args is None:
        raise ValueError("`logging_args.aim_args` must be given")
    return AimTracker(args.aim_args, config)


def _build_wandb(args: LoggingArgs, config: Mapping[str, Any]) -> Tracker:
    if args.wandb_args is None:
        raise ValueError("`logging_args.wandb_args` must be given")
    return WandBTracker(args.wandb_args, config)


TRACKERS: Mapping[str, Callable[[LoggingArgs, Mapping[str, Any]], Tracker]] = {
    "aim": _build_aim,
    "wandb": _build_wandb,
}


def build_trackers(
    args: LoggingArgs,
    *,
    metrics_path: Path,
    config: Mapping[str, Any],
    others: Mapping[str, Tracker] | None = None,
) -> Trackers:
    """Build the trackers of the one rank that tracks.

    Args:
        args: `logging_args` of the run file.
        metrics_path: The run's `metrics.jsonl`.
        config: What the run was started with, shown beside its numbers.
        others: More trackers by name, such as a progress bar.

    Returns:
        `metrics.jsonl`, the tracker that the file names, and the others.
    """
    trackers: dict[str, Tracker] = {"metrics": JsonLines(metrics_path)}
    if args.experiments_tracker_name is not None:
        name = args.experiments_tracker_name
        trackers[name] = TRACKERS[name](args, config)
    return Trackers({**trackers, **(others or {})})

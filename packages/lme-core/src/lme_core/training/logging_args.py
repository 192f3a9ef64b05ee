"""The run file's `logging_args`: what is logged, how often and where to."""

import logging
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class AimArgs:
    """Where an aim run is kept."""

    repo: str
    """Folder or address of the aim repository."""
    experiment: str
    """Name of the experiment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WandBArgs:
    """Where a Weights and Biases run is kept."""

    project: str
    """Project; made if absent."""
    name: str | None = None
    """Name of the run; null: chosen by the service."""
    entity: str | None = None
    """User or team; null: the account's default."""
    tags: list[str] | None = None
    """Tags of the run."""
    group: str | None = None
    """Group of runs it belongs to."""
    notes: str | None = None
    """Free text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingArgs:
    """What is logged, how often and where to."""

    logging_level: str = "INFO"
    """Least severe level shown: DEBUG, INFO, WARNING, ERROR or CRITICAL."""
    log_interval: int = 10
    """Optimizer steps between lines of metrics."""
    experiments_tracker_name: Literal["aim", "wandb"] | None = None
    """Tracker fed besides `metrics.jsonl`, which is always written."""
    aim_args: AimArgs | None = None
    """Needed by `experiments_tracker_name: aim`."""
    wandb_args: WandBArgs | None = None
    """Needed by `experiments_tracker_name: wandb`."""
    use_colored_logs: bool = False
    """Colour levels of the log."""
    torch_profiler_trace_path: str | None = None
    """Folder for a trace of one step, for TensorBoard or Perfetto; null: no trace."""
    cost_per_accelerator_per_hour: float | None = None
    """US dollars; adds the money spent to the metrics. Null: left out."""

    def __post_init__(self) -> None:
        if self.logging_level.upper() not in logging.getLevelNamesMapping():
            raise ValueError(
                "`logging_args.logging_level` must be DEBUG, INFO, WARNING, ERROR or CRITICAL; "
                f"got {self.logging_level}"
            )
        if self.log_interval < 1:
            raise ValueError(
                f"`logging_args.log_interval` must be at least 1, got {self.log_interval}"
            )
        for name, section in (("aim", self.aim_args), ("wandb", self.wandb_args)):
            if self.experiments_tracker_name == name and section is None:
                raise ValueError(
                    f"`logging_args.{name}_args` must be given with "
                    f"`logging_args.experiments_tracker_name: {name}`"
                )
        cost = self.cost_per_accelerator_per_hour
        if cost is not None and cost < 0:
            raise ValueError(
                f"`logging_args.cost_per_accelerator_per_hour` must be at least 0, got {cost}"
            )

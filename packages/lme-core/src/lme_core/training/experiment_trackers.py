"""Weights and Biases, and aim: fed with the records that `metrics.jsonl` gets."""

import warnings
from collections.abc import Mapping
from typing import Any

from lme_core.training.logging_args import AimArgs, WandBArgs

_NOT_METRICS = frozenset({"context", "group", "step"})


class WandBTracker:
    """Sends records to Weights and Biases; a resumed run goes on under the same id.

    The service cannot take records back: where a run was killed between checkpoints its steps
    overlap there, and `metrics.jsonl` is the truth.
    """

    def __init__(self, args: WandBArgs, config: Mapping[str, Any]) -> None:
        """Keep what the run will be opened with.

        Args:
            args: `logging_args.wandb_args`.
            config: Shown as the run's config.
        """
        self._args = args
        self._config = dict(config)
        self._run_id: str | None = None
        # `Any`: wandb is optional, so its types may not be there.
        self._run: Any = None

    def start(self, step: int) -> None:
        """Open the run, under the saved id if there is one."""
        # Optional and slow to import; its types may be absent.
        import wandb  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=self._args.project,
            name=self._args.name,
            entity=self._args.entity,
            tags=self._args.tags,
            group=self._args.group,
            notes=self._args.notes,
            config=self._config,
            id=self._run_id,
            resume="allow",
        )
        self._run_id = self._run.id
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a record, with `context/` or `context/group/` before each name."""
        prefix = record["context"] if record["group"] is None else "{context}/{group}"
        prefix = prefix.format(**record)
        self._run.log(
            {"iteration": record["step"]}
            | {f"{prefix}/{name}": value for name, value in _metrics(record).items()}
        )

    def flush(self) -> None:
        """Do nothing: wandb sends in the background."""

    def finish(self) -> None:
        """Send what is left and close the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def state_dict(self) -> dict[str, Any]:
        """Return the run's id."""
        return {"run_id": self._run_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on under a saved id."""
        self._run_id = state["run_id"]


class AimTracker:
    """Sends records to an aim repository; repeated steps of a resumed run are overwritten."""

    def __init__(self, args: AimArgs, config: Mapping[str, Any]) -> None:
        """Keep what the run will be opened with.

        Args:
            args: `logging_args.aim_args`.
            config: Kept as the run's parameters.
        """
        self._args = args
        self._config = dict(config)
        self._run_hash: str | None = None
        # `Any`: aim is optional, so its types may not be there.
        self._run: Any = None

    def start(self, step: int) -> None:
        """Open the run, under the saved hash if there is one."""
        with warnings.catch_warnings():
            # Its own imports warn about deprecations that no user of ours can mend.
            warnings.simplefilter("ignore")
            # Optional and slow to import; its types may be absent.
            from aim import Run  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

        self._run = Run(
            run_hash=self._run_hash, repo=self._args.repo, experiment=self._args.experiment
        )
        self._run_hash = self._run.hash
        self._run["config"] = self._config

    def log(self, record: Mapping[str, Any]) -> None:
        """Track each number of a record under its context and group."""
        context = {"subset": record["context"]}
        if record["group"] is not None:
            context["group"] = record["group"]
        for name, value in _metrics(record).items():
            self._run.track(value, name=name, step=record["step"], context=context)

    def flush(self) -> None:
        """Do nothing: aim writes in the background."""

    def finish(self) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.close()
            self._run = None

    def state_dict(self) -> dict[str, Any]:
        """Return the run's hash."""
        return {"run_hash": self._run_hash}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on under a saved hash."""
        self._run_hash = state["run_hash"]


def _metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in record.items()
        if name not in _NOT_METRICS and value is not None
    }

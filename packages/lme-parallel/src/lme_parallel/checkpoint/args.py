"""The `save_args` and `load_args` sections: where a run is saved and where it starts from."""

from dataclasses import dataclass

from lme_parallel.args import require_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveArgs:
    """Where and how often a run is saved."""

    save_path: str
    """Directory of the run; made if absent."""
    save_interval: int
    """Optimizer steps between saves; the last step is always saved."""
    save_optimizer: bool = True
    """Save the optimizer's state; without it a run can only restart with fresh moments."""
    async_checkpointing: bool = False
    """Copy to a host buffer, then write in the background while training goes on."""
    keep_last: int | None = None
    """Keep only the newest this many checkpoints; null: keep all."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step are never removed; null: none is special."""

    def __post_init__(self) -> None:
        if not self.save_path:
            raise ValueError("`save_path` must name a directory, got an empty string")
        require_positive(
            save_interval=self.save_interval, keep_last=self.keep_last, keep_every=self.keep_every
        )
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError(
                f"`keep_every: {self.keep_every}` has no effect without `keep_last`, as then every"
                " checkpoint is kept; add `keep_last: 1` or leave `keep_every` out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadArgs:
    """What a run starts from, and which parts of it are taken over."""

    load_path: str
    """Directory of a run, the one that holds `global_step*`."""
    iteration: int | None = None
    """Step of the checkpoint; null: the newest committed one."""
    load_optimizer: bool = True
    """Take over the optimizer's state."""
    load_lr_scheduler: bool = True
    """Take over the schedule's position; must be false when `load_optimizer` is false."""
    load_rng_state: bool = True
    """Take over generator states, where user code saved some."""
    load_dataloader_state: bool = True
    """Continue in the data where the checkpoint stopped; false: start at the beginning."""
    load_experiments_tracker_state: bool = True
    """Continue the tracker's run."""
    load_starting_iteration: bool = True
    """Continue counting steps; false: start at step 0."""
    resume_learning_rate: bool = True
    """Without the schedule's position, start the new schedule from the saved learning rate."""

    def __post_init__(self) -> None:
        if not self.load_path:
            raise ValueError("`load_path` must name a directory, got an empty string")
        if self.iteration is not None and self.iteration < 0:
            raise ValueError(f"`iteration` must be at least 0, got {self.iteration}")
        if self.load_lr_scheduler and not self.load_optimizer:
            raise ValueError(
                "`load_optimizer: false` also needs `load_lr_scheduler: false`, as the schedule"
                " continues from the optimizer's learning rate"
            )
        if self.load_lr_scheduler and not self.resume_learning_rate:
            raise ValueError(
                "`resume_learning_rate: false` also needs `load_lr_scheduler: false`, as the"
                " schedule's position decides the learning rate"
            )

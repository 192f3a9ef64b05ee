"""Schedules: what each process of a pipeline computes, in which order.

The orders are those of torch.distributed.pipelining; what they ask for is checked here first, so
that a setting that cannot work is named with what would.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lme_parallel.args import DistributedArgs

_V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
_SINGLE = ("GPipe", "1F1B")
_SPLIT = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
_ROUNDS = ("Interleaved1F1B", "InterleavedZeroBubble")


class Kind(StrEnum):
    """What is computed."""

    FORWARD = "forward"
    BACKWARD = "backward"
    """Gradients of inputs and of parameters."""
    BACKWARD_INPUT = "backward_input"
    """Of inputs only."""
    BACKWARD_WEIGHT = "backward_weight"
    """Of parameters, after those of inputs."""


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of work."""

    kind: Kind
    stage: int
    micro: int
    """Which micro batch."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule with the numbers it depends on, but for the number of micro batches."""

    name: str
    """As torch knows it."""
    ranks: int
    stages: int

    @property
    def is_v_shaped(self) -> bool:
        """Whether stages go to the last process and back to the first."""
        return self.name in _V_SHAPED

    @property
    def is_split(self) -> bool:
        """Whether gradients of inputs and of parameters are computed at different times."""
        return self.name in _SPLIT

    def rank_of(self, stage: int) -> int:
        """Return which process of the pipeline has a stage."""
        if self.is_v_shaped and stage >= self.ranks:
            return 2 * self.ranks - 1 - stage
        return stage % self.ranks

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages of a process, ascending."""
        return tuple(each for each in range(self.stages) if self.rank_of(each) == rank)

    def check_micro_batches(self, count: int) -> None:
        """Raise unless the schedule can run so many micro batches.

        Args:
            count: Of a step, in each pipeline.

        Raises:
            ValueError: If not, with the next number that works.
        """
        reason = self._refusal(count)
        if reason is None:
            return
        works = next(each for each in range(count + 1, 8 * count + 64) if not self._refusal(each))
        raise ValueError(
            f"`pipeline_parallel_schedule: {self.name}` with {self.ranks} ranks and {self.stages}"
            f" stages {reason}, got {count}; set `gradient_accumulation_steps` to {works}, or use"
            " `LoopedBFS`"
        )

    def _refusal(self, count: int) -> str | None:
        if self.name == "DualPipeV" and count < self.stages:
            return f"needs at least {self.stages} micro batches a step"
        if self.name in _ROUNDS and count % (rounds := max(1, count // self.ranks)):
            return (
                f"needs micro batches that divide into rounds of about {self.ranks}, here"
                f" {rounds} rounds"
            )
        return None


def read_schedule(args: DistributedArgs) -> Schedule:
    """Find the schedule that settings ask for.

    Args:
        args: The `distributed_args` section, of more than one pipeline rank.

    Raises:
        ValueError: If the schedule does not go with the number of stages.
    """
    ranks, stages = args.pipeline_parallel_world_size, args.num_pipeline_stages
    given = name = args.pipeline_parallel_schedule
    each = stages // ranks
    setting = f"`pipeline_parallel_schedule: {given}`"
    if each == 0 or stages % ranks or name is None:
        raise ValueError(
            f"`pipeline_parallel_world_size: {ranks}` needs `num_pipeline_stages` of a multiple of"
            f" {ranks} and a `pipeline_parallel_schedule`; got {stages} and {given}"
        )
    if name == "1F1B" and each > 1:
        name = "Interleaved1F1B"
    if name == "FlexibleInterleaved1F1B":
        # Interleaved 1F1B takes rounds of any length by now.
        name = "Interleaved1F1B"
    if name == "GPipe" and each > 1:
        raise ValueError(
            f"{setting} has one stage a rank, so `num_pipeline_stages` must be {ranks}, got"
            f" {stages}; with more stages use `LoopedBFS`"
        )
    if name in _V_SHAPED and each != 2:
        raise ValueError(
            f"{setting} has two stages a rank, so `num_pipeline_stages` must be {2 * ranks}, got"
            f" {stages}"
        )
    if name not in _SINGLE and each < 2:
        raise ValueError(
            f"{setting} has at least two stages a rank, so `num_pipeline_stages` must be"
            f" {2 * ranks} or more, got {stages}; with {ranks} use `1F1B`"
        )
    return Schedule(name, ranks, stages)


def check_schedule(args: DistributedArgs, micro_batches: int | None = None) -> None:
    """Raise unless a schedule goes with its numbers; of one pipeline rank there is none to check.

    Args:
        args: The `distributed_args` section.
        micro_batches: Of a step, which is `gradient_accumulation_steps`; `None`: not known.

    Raises:
        ValueError: Naming the setting and what would work.
    """
    if args.pipeline_parallel_world_size == 1:
        return
    schedule = read_schedule(args)
    if micro_batches is not None:
        schedule.check_micro_batches(micro_batches)


def compute_orders(schedule: Schedule, micro_batches: int) -> list[list[Action]]:
    """Return what each process computes, in order.

    Args:
        schedule: From `read_schedule`.
        micro_batches: Of a step.

    Returns:
        By rank of the pipeline.

    Raises:
        ValueError: As of `Schedule.check_micro_batches`.
    """
    schedule.check_micro_batches(micro_batches)
    if schedule.name in _SINGLE:
        # Torch's own lists for these leave out a forward pass, and 2.9 asks for more micro batches.
        return [_one_stage(schedule, rank, micro_batches) for rank in range(schedule.ranks)]
    from torch.distributed.pipelining._schedule_visualizer import (  # noqa: PLC0415 (slow to load)
        get_schedule_ops,
    )

    each = schedule.stages // schedule.ranks
    found = get_schedule_ops(schedule.name, schedule.ranks, micro_batches, each)
    return [_read(actions) for actions in found]


def forward_orders(schedule: Schedule) -> list[list[Action]]:
    """Return the order of one forward pass, by rank of the pipeline."""
    return [
        [Action(Kind.FORWARD, stage, 0) for stage in schedule.stages_of(rank)]
        for rank in range(schedule.ranks)
    ]


def _one_stage(schedule: Schedule, rank: int, micro_batches: int) -> list[Action]:
    """Order the work of a process with one stage.

    Source: Huang et al. 2019 (arXiv:1811.06965) for GPipe; Narayanan et al. 2021
    (arXiv:2104.04473), figure 4, for 1F1B: as many forward passes ahead as there are stages after.
    """
    forward = [Action(Kind.FORWARD, rank, micro) for micro in range(micro_batches)]
    backward = [Action(Kind.BACKWARD, rank, micro) for micro in range(micro_batches)]
    if schedule.name == "GPipe":
        return forward + backward
    ahead = min(micro_batches, schedule.ranks - 1 - rank)
    order = forward[:ahead]
    for pair in zip(forward[ahead:], backward, strict=False):
        order += pair
    return order + backward[micro_batches - ahead :]


def _read(actions: Sequence[object]) -> list[Action]:
    """Read torch's actions; messages and sums over replicas are left to this package."""
    kinds = {
        "FORWARD": Kind.FORWARD,
        "FULL_BACKWARD": Kind.BACKWARD,
        "BACKWARD_INPUT": Kind.BACKWARD_INPUT,
        "BACKWARD_WEIGHT": Kind.BACKWARD_WEIGHT,
    }
    read: list[Action] = []
    for each in actions:
        if each is None:
            continue
        inner = getattr(each, "sub_actions", None)
        if inner:
            read += _read(inner)
            continue
        # Values differ from version to version, names do not.
        kind = kinds.get(each.computation_type.name)  # type: ignore[attr-defined] # torch's
        if kind is not None:
            read.append(Action(kind, each.stage_index, each.microbatch_index))  # type: ignore[attr-defined]
    return read

"""Named mesh axes from the settings and the number of processes: arithmetic, no processes."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from lme_parallel.args import DistributedArgs

AXES = ("pipeline", "replicate", "shard", "context", "tensor")
"""Slowest to fastest; `context` divides `replicate` times `shard`, see `Topology`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Where one process stands in the layout.

    Processes are numbered with the tensor axis fastest, then the data axes, then the pipeline.
    Context-parallel ranks take part in sharding the parameters, so that
    `replicate * shard == data * context`, and expert-parallel ranks are a part of those too.
    """

    world_size: int
    """Processes in all."""
    rank: int
    """Number of this process, from 0."""
    pipeline: int
    """Ranks in a pipeline."""
    num_stages: int
    """Pieces the layers are cut into."""
    replicate: int
    """Copies of the sharded parameters."""
    shard: int
    """Ranks that share one copy of the parameters."""
    context: int
    """Ranks that split each sequence."""
    tensor: int
    """Ranks that split each matrix."""
    expert: int
    """Ranks that divide the experts."""

    @classmethod
    def from_args(cls, args: DistributedArgs, world_size: int, rank: int) -> "Topology":
        """Lay out `world_size` processes as `args` asks.

        Args:
            args: The `distributed_args` section.
            world_size: Processes in all, at least 1.
            rank: Number of this process, from 0.

        Returns:
            The layout as seen from `rank`.

        Raises:
            ValueError: If the processes do not divide as asked, naming the setting to change.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to {world_size - 1}, got {rank}")
        inner = _inner_size(args, world_size)
        replicate, shard = _replicas_and_shards(args, inner)
        expert = args.expert_parallel_world_size
        if inner % expert:
            raise ValueError(
                f"`expert_parallel_world_size` must divide the {inner} data-parallel ranks,"
                f" got {expert}"
            )
        if shard % expert and expert % shard:
            raise ValueError(
                f"`expert_parallel_world_size` ({expert}) must divide"
                f" `data_parallel_sharding_world_size` ({shard}) or be a multiple of it; change one"
                " of them"
            )
        if args.fsdp_algorithm is None and args.stage > 0 and inner > 1:
            raise ValueError(
                f"`fsdp_algorithm: null` shards nothing, but `stage: {args.stage}` on {inner}"
                " data-parallel ranks does; use `stage: 0` or `fsdp_algorithm: 2`"
            )
        return cls(
            world_size=world_size,
            rank=rank,
            pipeline=args.pipeline_parallel_world_size,
            num_stages=args.num_pipeline_stages,
            replicate=replicate,
            shard=shard,
            context=args.context_parallel_world_size,
            tensor=args.tensor_parallel_world_size,
            expert=expert,
        )

    @property
    def is_single(self) -> bool:
        """Whether one process does everything, so that no process group is needed."""
        return self.world_size == 1

    @property
    def data_world_size(self) -> int:
        """Groups of ranks that read different rows of the global batch."""
        return self.replicate * self.shard // self.context

    @property
    def data_rank(self) -> int:
        """Which rows this process reads, from 0 to `data_world_size - 1`."""
        return self._inner_rank // self.context

    @property
    def expert_shard(self) -> int:
        """Ranks that share one copy of the same experts."""
        return max(1, self.shard // self.expert)

    @property
    def expert_replicate(self) -> int:
        """Copies of the sharded parameters of the same experts."""
        return self.replicate * self.shard // (self.expert * self.expert_shard)

    @property
    def coordinates(self) -> Mapping[str, int]:
        """This process's place on each axis, with `data` and `expert` beside `AXES`."""
        inner = self._inner_rank
        return {
            "pipeline": self.rank // (self.tensor * self.replicate * self.shard),
            "replicate": inner // self.shard,
            "shard": inner % self.shard,
            "data": inner // self.context,
            "context": inner % self.context,
            "expert": inner % self.expert,
            "tensor": self.rank % self.tensor,
        }

    def describe(self) -> dict[str, int]:
        """Return the sizes of the layout, the same on every rank, for a checkpoint's state."""
        return {
            "world_size": self.world_size,
            "pipeline": self.pipeline,
            "num_stages": self.num_stages,
            "replicate": self.replicate,
            "shard": self.shard,
            "context": self.context,
            "tensor": self.tensor,
            "expert": self.expert,
        }

    @property
    def _inner_rank(self) -> int:
        return (self.rank // self.tensor) % (self.replicate * self.shard)


def _inner_size(args: DistributedArgs, world_size: int) -> int:
    """Ranks left for data and context after tensor and pipeline took theirs."""
    sizes = {
        "pipeline_parallel_world_size": args.pipeline_parallel_world_size,
        "context_parallel_world_size": args.context_parallel_world_size,
        "tensor_parallel_world_size": args.tensor_parallel_world_size,
    }
    needed = prod(sizes.values())
    if world_size % needed:
        given = " * ".join(f"`{name}` ({size})" for name, size in sizes.items() if size > 1)
        raise ValueError(
            f"the layout needs a multiple of {needed} processes, {given}, but there are"
            f" {world_size}; start {needed * max(1, world_size // needed)} or change the sizes"
        )
    return world_size // needed * args.context_parallel_world_size


def _replicas_and_shards(args: DistributedArgs, inner: int) -> tuple[int, int]:
    replicate = args.zero_topology.data_parallel_replication_world_size
    shard = args.zero_topology.data_parallel_sharding_world_size
    if replicate is None or shard is None:
        return (inner, 1) if args.stage == 0 else (1, inner)
    if replicate * shard != inner:
        raise ValueError(
            f"`data_parallel_replication_world_size` ({replicate}) times"
            f" `data_parallel_sharding_world_size` ({shard}) must be the number of data-parallel"
            f" ranks, {inner}; change them or leave `zero_topology` out"
        )
    return replicate, shard

"""The `distributed_args` section: how a model is spread over processes and what is recomputed."""

from dataclasses import dataclass, field
from typing import Literal

DtypeName = Literal["fp32", "float32", "bf16", "bfloat16", "fp16", "float16"]
SavedOp = Literal["attention", "linear", "matmul", "communication"]
ScheduleName = Literal[
    "GPipe",
    "1F1B",
    "Interleaved1F1B",
    "FlexibleInterleaved1F1B",
    "LoopedBFS",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
]


def require_positive(**values: int | None) -> None:
    """Raise unless every value is absent or at least 1.

    Args:
        values: Settings by the name the user writes; `None` means not given.

    Raises:
        ValueError: Naming the first setting below 1.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroTopologyArgs:
    """How the data-parallel ranks divide into replicas and shards (hybrid sharding)."""

    data_parallel_replication_world_size: int | None = None
    """Copies of the sharded model; null: 1."""
    data_parallel_sharding_world_size: int | None = None
    """Ranks that share one copy; null: all data-parallel ranks."""

    def __post_init__(self) -> None:
        sizes = (self.data_parallel_replication_world_size, self.data_parallel_sharding_world_size)
        require_positive(
            data_parallel_replication_world_size=sizes[0],
            data_parallel_sharding_world_size=sizes[1],
        )
        if (sizes[0] is None) != (sizes[1] is None):
            missing = (
                "data_parallel_replication_world_size"
                if sizes[0] is None
                else "data_parallel_sharding_world_size"
            )
            raise ValueError(f"`zero_topology` needs both sizes or neither; `{missing}` is missing")


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientCheckpointingArgs:
    """Which blocks are recomputed in the backward pass."""

    checkpoint_every_n_layers: int | None = None
    """Recompute layers 0, n, 2n, ...; null: every layer."""
    num_blocks: int | None = None
    """Only the first this many layers are considered; null: all."""
    block_name: str | None = None
    """Accepted for older run files and ignored with a warning: blocks are found by structure."""
    use_reentrant: bool = False
    """Use torch's reentrant implementation; slower to compile, otherwise the same numbers."""
    save_ops: tuple[SavedOp, ...] | None = None
    """Ops whose results `gradient_checkpointing_method: selective` keeps. `attention`: fused
    attention; `linear`: products with weights, experts' too; `matmul`: these and products of
    activations; `communication`: what came from other tensor- or context-parallel processes. null:
    `[attention, linear]`."""

    def __post_init__(self) -> None:
        require_positive(
            checkpoint_every_n_layers=self.checkpoint_every_n_layers, num_blocks=self.num_blocks
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedArgs:
    """How the model is spread over processes, recomputed and compiled."""

    stage: Literal[0, 1, 2, 3] = 3
    """ZeRO stage: 0 all whole; 1 optimizer state sharded; 2 gradients too; 3 parameters too."""
    fsdp_algorithm: Literal[1, 2, 3] | None = 2
    """1 FullyShardedDataParallel, 2 fully_shard, 3 runs as 2; null: DDP (stage 0) or one process."""
    zero_topology: ZeroTopologyArgs = field(default_factory=ZeroTopologyArgs)
    """Replicas and shards of the data-parallel ranks; absent: one replica, all ranks shard it."""
    cpu_offload: bool = False
    """Keep sharded parameters and optimizer state in host memory between steps."""
    communication_dtype: DtypeName | None = None
    """Dtype in which gradients are summed over ranks; null: fp32."""
    gradient_checkpointing_method: Literal["block", "full", "selective"] | None = None
    """`block` recomputes the blocks chosen by `gradient_checkpointing_args`, `full` every block;
    `selective` does what `block` does, but keeps results of ops that are slow to compute again."""
    gradient_checkpointing_args: GradientCheckpointingArgs = field(
        default_factory=GradientCheckpointingArgs
    )
    """Which blocks `gradient_checkpointing_method` `block` or `selective` recomputes."""
    torch_compile: bool = False
    """Compile each block, in place."""
    tensor_parallel_world_size: int = 1
    """Ranks that split each matrix."""
    sequence_parallel: bool = False
    """Split activations along the sequence between tensor-parallel regions."""
    use_async_tensor_parallel: bool = False
    """Overlap tensor-parallel communication with matrix products, where the device can."""
    pipeline_parallel_world_size: int = 1
    """Ranks in a pipeline."""
    num_pipeline_stages: int = 1
    """Pieces the layers are cut into; a multiple of `pipeline_parallel_world_size`."""
    pipeline_parallel_schedule: ScheduleName | None = None
    """Order of micro batches through the stages; required with more than one stage."""
    context_parallel_world_size: int = 1
    """Ranks that split each sequence."""
    context_parallel_load_balancing_method: Literal["headtail"] | None = None
    """`headtail`: rank r takes chunks r and 2W-1-r of 2W; null: contiguous chunks."""
    context_parallel_attention: Literal["all_gather", "ring"] = "all_gather"
    """`all_gather`: each rank collects all keys and values, and the fastest kernels attend to them;
    `ring`: they go around in parts while those that are here are attended to, in less memory."""
    expert_parallel_world_size: int = 1
    """Ranks, out of the data-parallel ones, that divide the experts of a MoE layer."""
    timeout_minutes: int | None = None
    """Minutes after which a stuck collective fails; null: torch's default."""
    watchdog_seconds: float | None = None
    """Seconds without progress after which a run of several processes is ended, naming the process
    that holds it up; null: four fifths of the time after which a stuck collective fails; 0: never."""
    sync_every_gradient_accumulation_step: bool | None = None
    """Sum gradients over ranks in every micro step; null: in stages 2 and 3 only."""

    def __post_init__(self) -> None:
        require_positive(
            tensor_parallel_world_size=self.tensor_parallel_world_size,
            pipeline_parallel_world_size=self.pipeline_parallel_world_size,
            num_pipeline_stages=self.num_pipeline_stages,
            context_parallel_world_size=self.context_parallel_world_size,
            expert_parallel_world_size=self.expert_parallel_world_size,
            timeout_minutes=self.timeout_minutes,
        )
        if self.watchdog_seconds is not None and not self.watchdog_seconds >= 0:
            raise ValueError(f"`watchdog_seconds` must be at least 0, got {self.watchdog_seconds}")
        self._check_recomputation()
        self._check_data_parallel()
        self._check_tensor_parallel()
        self._check_expert_parallel()
        self._check_pipeline()

    def watchdog_limit(self) -> float | None:
        """Return the seconds after which a watchdog acts; `None`: there is none."""
        if self.watchdog_seconds is None:
            # NCCL gives up after 10 minutes, and says less.
            return 0.8 * 60 * (self.timeout_minutes or 10)
        return self.watchdog_seconds or None

    def _check_recomputation(self) -> None:
        is_selective = self.gradient_checkpointing_method == "selective"
        if is_selective and self.gradient_checkpointing_args.use_reentrant:
            raise ValueError(
                "`use_reentrant: true` does not work with `gradient_checkpointing_method: selective`,"
                " since torch's reentrant implementation keeps no results; use false"
            )

    def _check_data_parallel(self) -> None:
        sharding = self.zero_topology.data_parallel_sharding_world_size
        if self.stage == 0 and sharding is not None and sharding != 1:
            raise ValueError(
                "`stage: 0` keeps everything whole, so `data_parallel_sharding_world_size` must be"
                f" 1 or absent, got {sharding}; use `stage: 3` to shard"
            )
        if self.cpu_offload and self.fsdp_algorithm is None:
            raise ValueError("`cpu_offload: true` needs `fsdp_algorithm` 1, 2 or 3, got null")

    def _check_tensor_parallel(self) -> None:
        size = self.tensor_parallel_world_size
        if size > 1 and self.fsdp_algorithm == 1:
            raise ValueError(
                f"`tensor_parallel_world_size: {size}` does not work with `fsdp_algorithm: 1`;"
                " use `fsdp_algorithm: 2`"
            )
        if self.sequence_parallel and size == 1:
            raise ValueError(
                "`sequence_parallel: true` needs `tensor_parallel_world_size` of at least 2, got 1"
            )
        if self.use_async_tensor_parallel and not self.sequence_parallel:
            raise ValueError("`use_async_tensor_parallel: true` needs `sequence_parallel: true`")

    def _check_expert_parallel(self) -> None:
        size = self.expert_parallel_world_size
        if size > 1 and self.fsdp_algorithm == 1:
            raise ValueError(
                f"`expert_parallel_world_size: {size}` does not work with `fsdp_algorithm: 1`;"
                " use `fsdp_algorithm: 2`"
            )

    def _check_pipeline(self) -> None:
        ranks, stages = self.pipeline_parallel_world_size, self.num_pipeline_stages
        if stages % ranks:
            raise ValueError(
                f"`num_pipeline_stages` must be a multiple of `pipeline_parallel_world_size`"
                f" ({ranks}), got {stages}"
            )
        if stages > 1 and self.pipeline_parallel_schedule is None:
            raise ValueError(
                f"`num_pipeline_stages: {stages}` needs a `pipeline_parallel_schedule`, for example"
                " `1F1B`"
            )
        if ranks > 1 and self.fsdp_algorithm == 1:
            raise ValueError(
                f"`pipeline_parallel_world_size: {ranks}` does not work with `fsdp_algorithm: 1`;"
                " use `fsdp_algorithm: 2`"
            )

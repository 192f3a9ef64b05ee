"""The layouts, as `distributed_args` of run files, and the run file of each."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from several_gpus.cases import Case

WHOLE = {"stage": 0, "fsdp_algorithm": None}
SHARDED = {"stage": 3, "fsdp_algorithm": 2}
TENSOR = {**WHOLE, "tensor_parallel_world_size": 2, "sequence_parallel": True}
PIPELINE = {**WHOLE, "pipeline_parallel_world_size": 2}
CONTEXT = {
    **WHOLE,
    "context_parallel_world_size": 2,
    "context_parallel_load_balancing_method": "headtail",
}
TORCH_OPS = ["rmsnorm@torch", "fused_residual_add_rmsnorm@torch", "swiglu_packed@torch"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is spread over processes, and how a step is cut into micro batches."""

    title: str
    processes: int
    distributed: dict[str, Any]
    batch: Literal["usual", "half", "pipeline"] = "usual"
    sections: dict[str, Any] = field(default_factory=dict)
    """Further sections of the run file."""

    def micro_batch(self, case: Case) -> int:
        """Sequences that a process runs at once."""
        sizes = {"half": max(1, case.micro_batch // 2), "pipeline": case.pipeline_micro_batch}
        return sizes.get(self.batch, case.micro_batch)


ONE = "one"
# The same computation on one GPU with other roundings: how far two right runs are apart.
NOISE = ("one-half-batches", "one-torch-ops")
LAYOUTS = {
    ONE: Layout("one GPU", 1, WHOLE),
    NOISE[0]: Layout("one GPU, half micro batches", 1, WHOLE, "half"),
    NOISE[1]: Layout(
        "one GPU, norms and SwiGLU in torch",
        1,
        WHOLE,
        sections={"kernel_args": {"kernels": TORCH_OPS}},
    ),
    "fsdp2": Layout("FSDP2", 2, SHARDED),
    "hsdp": Layout(
        "HSDP, 2 by 1",
        2,
        {
            **SHARDED,
            "zero_topology": {
                "data_parallel_replication_world_size": 2,
                "data_parallel_sharding_world_size": 1,
            },
        },
    ),
    "tp": Layout("TP, sequence parallel", 2, TENSOR),
    "tp-async": Layout("TP, asynchronous", 2, {**TENSOR, "use_async_tensor_parallel": True}),
    "pp-1f1b": Layout(
        "PP, 1F1B",
        2,
        {**PIPELINE, "num_pipeline_stages": 2, "pipeline_parallel_schedule": "1F1B"},
        "pipeline",
    ),
    "pp-interleaved": Layout(
        "PP, interleaved",
        2,
        {**PIPELINE, "num_pipeline_stages": 4, "pipeline_parallel_schedule": "Interleaved1F1B"},
        "pipeline",
    ),
    "cp-ring": Layout("CP, ring", 2, {**CONTEXT, "context_parallel_attention": "ring"}),
    "cp-all-gather": Layout(
        "CP, all-gather", 2, {**CONTEXT, "context_parallel_attention": "all_gather"}
    ),
    # Not in the default list.
    "ddp": Layout("DDP", 2, WHOLE),
}
DEFAULT = [name for name in LAYOUTS if name != "ddp"]


def run_file(
    case: Case,
    layout: Layout,
    *,
    data: Path,
    folder: Path,
    steps: int,
    dtype: str,
    compiled: bool,
    rows: int | None = None,
) -> dict[str, Any]:
    """Return the run file of a layout; two of a case differ only in how work is spread.

    Args:
        case: Model and batch.
        layout: How it is spread.
        data: Prefix of the tokens.
        folder: The run's directory.
        steps: Optimizer steps.
        dtype: Of the computation.
        compiled: Whether blocks are compiled.
        rows: Sequences of a step, if not the case's.
    """
    return {
        "datasets": [
            {
                "class_name": "MegatronDataset",
                "data_name": "language",
                "class_args": {
                    "train_data_path": [str(data)],
                    "sequence_length": case.sequence,
                    # Runs of other lengths read the same rows.
                    "order": "stable",
                },
            }
        ],
        "model_args": {
            "pretrained_config": {**case.model, "max_position_embeddings": case.sequence}
        },
        "tuning_args": {"tuning_method": "pretraining"},
        "training_parameters": {
            "num_training_steps": steps,
            "micro_batch_size": layout.micro_batch(case),
            "global_batch_size": rows or case.rows,
            "eval_during_training": False,
        },
        "optimizer_args": {"class_name": "TorchAdamW", "class_args": {"lr": case.learning_rate}},
        "lr_scheduler_args": {"num_warmup_steps": 5, "lr_decay_style": "constant"},
        "mixed_precision_args": {"dtype": dtype},
        "logging_args": {"log_interval": 1},
        "distributed_args": {**layout.distributed, "torch_compile": compiled},
        "save_args": {
            "save_path": str(folder),
            "save_interval": 10 * steps,
            "save_optimizer": False,
        },
        **layout.sections,
    }

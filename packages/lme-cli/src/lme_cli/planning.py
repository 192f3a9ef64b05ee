"""What a run will do, worked out before it does anything."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lme_cli.charts import short
from lme_cli.config import RunConfig
from lme_cli.errors import CommandError
from lme_cli.resolved import resolve
from lme_cli.resume import check_continues
from lme_convert.api import OpenedModel, open_model
from lme_core.config import ModelConfig, from_dict, to_dict
from lme_core.training.batch_plan import BatchPlan
from lme_data.dataset import DebugDatasetArgs, MegatronDatasetArgs
from lme_parallel.checkpoint.checkpointer import resume_point
from lme_parallel.checkpoint.reader import Checkpoint
from lme_parallel.launch import Launch, detect
from lme_parallel.topology import Topology

KILL_SWITCH = "KILLSWITCH"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where a run happens, how it is cut, and what it starts from."""

    run: RunConfig
    resolved: Mapping[str, Any]
    """Every setting as plain values, as in `run.resolved.json`."""
    launch: Launch
    """Which process this is."""
    device: torch.device
    topology: Topology
    batch: BatchPlan
    model_config: ModelConfig
    opened: OpenedModel | None
    """The model of `model_args.model_name`; `None` for a new one."""
    checkpoint: Checkpoint | None
    """Where the run starts from; `None` for a fresh start."""
    is_own: bool
    """Whether that checkpoint is this run's own, in `save_path`."""

    @property
    def save_path(self) -> Path:
        """The run directory."""
        return Path(self.run.save_args.save_path)

    @property
    def sequence_length(self) -> int | None:
        """Tokens of a row; `None` where rows differ."""
        for dataset in self.run.datasets:
            if isinstance(dataset, MegatronDatasetArgs | DebugDatasetArgs):
                return dataset.class_args.sequence_length
        return None

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the run."""
        return self.launch.rank == 0


def make_plan(run: RunConfig, launch: Launch | None = None) -> Plan:
    """Work out a run's plan; nothing is written and no model is built.

    Args:
        run: The sections.
        launch: Which process to plan for; `None`: this one.

    Raises:
        ValueError: If the layout or batch does not fit the processes there are.
        CommandError: If the checkpoint in `save_path` is of another run.
    """
    launch = detect(os.environ) if launch is None else launch
    topology = Topology.from_args(run.distributed_args, launch.world_size, launch.rank)
    batch = BatchPlan.resolve(run.training_parameters, topology.data_world_size)
    checkpoint = resume_point(run.save_args, run.load_args)
    is_own = (
        checkpoint is not None
        and checkpoint.path.parent.resolve() == Path(run.save_args.save_path).resolve()
    )
    resolved = resolve(run)
    opened = None
    if run.model_args.pretrained_config is not None:
        config = run.model_args.pretrained_config
    elif checkpoint is not None and is_own:
        config = from_dict(checkpoint.document("config.json"))
    else:
        opened = open_model(run.model_args.model_name or "")
        config = from_dict(opened.config)
    if checkpoint is not None and is_own:
        check_continues(checkpoint, resolved, to_dict(config))
    return Plan(
        run=run,
        resolved=resolved,
        launch=launch,
        device=launch.device(),
        topology=topology,
        batch=batch,
        model_config=config,
        opened=opened,
        checkpoint=checkpoint,
        is_own=is_own,
    )


def check_kill_switch(plan: Plan) -> None:
    """Refuse to start where a file asks every run to stop."""
    file = plan.save_path / KILL_SWITCH
    if file.exists():
        raise CommandError(f"{file} asks runs to stop; remove it to train")


def describe(plan: Plan, num_parameters: tuple[int, int]) -> list[tuple[str, str]]:
    """Write the plan as rows of a table.

    Args:
        plan: The plan.
        num_parameters: All, and those besides embeddings.
    """
    run, batch = plan.run, plan.batch
    steps = run.training_parameters.num_training_steps
    total, inner = num_parameters
    rows = [
        ("method", run.tuning_args.tuning_method),
        ("device", f"{device_name(plan.device)}, {run.mixed_precision_args.dtype}{_layout(plan)}"),
        ("parameters", f"{short(total)}, of which {short(inner)} besides embeddings"),
        ("batch", _batch(batch, plan.sequence_length)),
        ("steps", f"{steps:,}"),
    ]
    if plan.sequence_length is not None:
        tokens = steps * batch.global_batch_size * plan.sequence_length
        rows.append(("tokens", short(tokens)))
    rows.append(("data", ", ".join(each.data_name for each in run.datasets)))
    rows.append(("writes to", str(plan.save_path)))
    rows.append(("starts from", _start(plan)))
    return rows


def device_name(device: torch.device) -> str:
    """Name a device as its maker does, where that is known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return {"mps": "Apple GPU (MPS)"}.get(device.type, str(device))


def _layout(plan: Plan) -> str:
    size = plan.topology.world_size
    return "" if size == 1 else f", {size} processes"


def _batch(batch: BatchPlan, sequence_length: int | None) -> str:
    text = f"{batch.global_batch_size} sequences"
    if sequence_length is not None:
        text += f" of {sequence_length} tokens"
    parts = [f"micro batch {batch.micro_batch_size}"]
    if batch.gradient_accumulation_steps > 1:
        parts.append(f"accumulation {batch.gradient_accumulation_steps}")
    if batch.num_replicas > 1:
        parts.append(f"replicas {batch.num_replicas}")
    return f"{text} ({', '.join(parts)})"


def _start(plan: Plan) -> str:
    if plan.checkpoint is not None:
        return f"step {plan.checkpoint.step:,}, {plan.checkpoint.path}"
    if plan.opened is not None:
        return f"the weights of {plan.run.model_args.model_name}"
    return f"random weights, seed {plan.run.random_args.seed}"

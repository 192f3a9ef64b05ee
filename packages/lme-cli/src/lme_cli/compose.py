"""From a plan to a run ready to train: the one place that knows every package."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from lme_cli.flops import flops_per_token, peak_flops
from lme_cli.planning import KILL_SWITCH, Plan
from lme_cli.run_data import check_vocabulary, evaluation_sets, open_data
from lme_cli.run_file import RunFile
from lme_cli.run_tokenizer import find_tokenizer
from lme_core.architectures.decoder import Decoder, parameter_traits
from lme_core.config import to_dict
from lme_core.training.anomalies import StepGuard
from lme_core.training.batches import BatchStream
from lme_core.training.experts import ExpertBalance
from lme_core.training.hooks import (
    EvaluateHook,
    GarbageCollectionHook,
    GuardHook,
    LogHook,
    ProfileHook,
    SaveHook,
    StopHook,
)
from lme_core.training.objectives import Objective, build_objective
from lme_core.training.optimizers import build_optimizer
from lme_core.training.precision import LossScaler, MasterWeights, set_tf32
from lme_core.training.rewinding import Rewinder
from lme_core.training.runtime import Runtime
from lme_core.training.schedules import build_schedule
from lme_core.training.throughput import Throughput
from lme_core.training.tracking import Tracker, Trackers, build_trackers
from lme_core.training.trainer import Hook, StepReport, Trainer, TrainState
from lme_data.build import Loaders
from lme_data.tokenizer import TextTokenizer
from lme_kernels.policy import KernelPolicy
from lme_parallel.checkpoint.checkpointer import Checkpointer
from lme_parallel.parallelize import parallelize
from lme_parallel.runtime import DistributedRuntime

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A run put together; `state` says where it stands."""

    trainer: Trainer
    state: TrainState
    runtime: Runtime
    model: Decoder
    objective: Objective
    loaders: Loaders
    tokenizer: TextTokenizer | None
    trackers: Trackers
    checkpointer: Checkpointer
    evaluation: EvaluateHook | None
    """What evaluates; `None` where evaluation is off."""


def compose(
    plan: Plan,
    run_file: RunFile,
    *,
    trackers: Mapping[str, Tracker] | None = None,
    point: Callable[[str], None] | None = None,
    mark: Callable[[str], None] | None = None,
    first_hooks: Sequence[Hook] = (),
) -> Composed:
    """Put a run together and restore it; nothing is trained yet.

    Args:
        plan: From `make_plan`.
        run_file: Copied into the run directory.
        trackers: More trackers by name, such as a progress display.
        point: Called before each numbered step of writing a checkpoint; for tests.
        mark: Told which phase of a step begins; of a watchdog.
        first_hooks: Called after each step before those of the run.

    Returns:
        The run, its trackers started.

    Raises:
        ValueError: If the data, the model or the layout do not fit the settings.
    """
    run = plan.run
    set_tf32(run.mixed_precision_args.tf32)
    kernels = KernelPolicy.from_args(run.kernel_args)
    tokenizer = find_tokenizer(run, plan.opened)
    check_vocabulary(plan, tokenizer)
    loaders = open_data(plan, tokenizer)
    model = build_model(plan, kernels)
    placed = place_model(plan, model)
    if mark is not None:
        placed.mark = mark
        if point is None and not run.save_args.async_checkpointing:
            # A save of a large model takes longer than a step: each part of it is progress.
            point = _Progress(mark)
    # Equal in form, not in name: the packages do not know each other's classes.
    runtime = cast(Runtime, placed)
    optimizer = build_optimizer(
        run.optimizer_args,
        runtime.named_parameters(),
        parameter_traits(model),
        plan.model_config.m_width,
        kernels,
    )
    steps = run.training_parameters.num_training_steps
    schedule = build_schedule(run.lr_scheduler_args, optimizer, steps)
    objective = build_objective(
        run.tuning_args,
        auxiliary_weights=plan.model_config.auxiliary_weights(),
        teacher_args=run.teacher_args,
        teacher=_build_teacher(plan, kernels),
    )
    batches = BatchStream(
        loaders.train,
        gradient_accumulation_steps=plan.batch.gradient_accumulation_steps,
        device=plan.device,
        num_replicas=plan.topology.data_world_size,
    )
    followers = _build_trackers(plan, trackers or {})
    throughput = Throughput(
        num_devices=plan.topology.world_size,
        flops_per_token=flops_per_token(plan.model_config, plan.sequence_length),
        device_peak_flops=peak_flops(plan.device, run.mixed_precision_args.torch_dtype),
        cost_per_accelerator_per_hour=run.logging_args.cost_per_accelerator_per_hour,
    )
    parameters = run.training_parameters
    rewinds = parameters.bad_step_policy == "rewind"
    guard = StepGuard(
        policy=parameters.bad_step_policy,
        spike_sigmas=parameters.spike_sigmas,
        record_path=plan.save_path / f"bad-steps-rank{plan.launch.rank}.jsonl",
        device=plan.device,
        scales_loss=run.mixed_precision_args.torch_dtype == torch.float16,
        max_rewinds=parameters.max_rewinds,
        reduce=lambda flags: runtime.reduce(flags, "max"),
    )
    checkpointer = Checkpointer(
        run.save_args,
        parameters=runtime.named_parameters(),
        buffers=runtime.named_buffers(),
        optimizer=optimizer,
        stateful={
            "schedule": schedule,
            "loader": batches,
            "trackers": followers,
            "runtime": runtime,
            "throughput": throughput,
            # Only spikes and a number of rewinds depend on steps before.
            **({"guard": guard} if rewinds or parameters.spike_sigmas is not None else {}),
        },
        documents={
            "config.json": to_dict(plan.model_config),
            "run.resolved.json": plan.resolved,
        },
        topology=plan.topology,
        shards=placed.shards(),
        after_restore=runtime.finish_step,
        point=point,
    )
    state = TrainState()
    checkpointer.restore(state, run.load_args)
    if plan.is_first:
        _write_run_files(plan, run_file)
    followers.start(state.step)
    rewinder = None
    if rewinds:
        # What a bad step before the first save goes back to; nothing where a save was restored.
        checkpointer.save(state)
        kept = ("loader", "trackers", "throughput")
        rewinder = Rewinder(checkpointer, batches, followers, guard, keep=kept, mark=mark)
    evaluation = _build_evaluation(plan, runtime, objective, followers, loaders, tokenizer)
    looks = GuardHook(
        guard,
        interval=run.logging_args.log_interval,
        save_interval=run.save_args.save_interval,
        rewinder=rewinder,
    )
    hooks = _build_hooks(plan, runtime, followers, throughput, looks, evaluation, checkpointer)
    trainer = Trainer(
        runtime,
        objective,
        optimizer,
        schedule,
        batches,
        [*first_hooks, *hooks],
        num_training_steps=steps,
        gradient_clipping=run.training_parameters.gradient_clipping,
        seed=run.random_args.seed,
        balance=ExpertBalance.of(plan.model_config, runtime.named_buffers()),
        mark=mark,
        guard=guard,
    )
    return Composed(
        trainer=trainer,
        state=state,
        runtime=runtime,
        model=model,
        objective=objective,
        loaders=loaders,
        tokenizer=tokenizer,
        trackers=followers,
        checkpointer=checkpointer,
        evaluation=evaluation,
    )


def build_model(plan: Plan, kernels: KernelPolicy) -> Decoder:
    """Build the model without memory."""
    with torch.device("meta"):
        return plan.model_config.build(kernels, seed=plan.run.random_args.seed)


def place_model(plan: Plan, model: Decoder) -> DistributedRuntime:
    """Give the model memory and first values on its devices."""
    dtype = plan.run.mixed_precision_args.torch_dtype
    return parallelize(
        model,
        plan.topology,
        plan.run.distributed_args,
        device=plan.device,
        dtype=dtype,
        initial_value=_initial_value(plan, model),
        masters=MasterWeights,
        scaler=LossScaler(plan.device) if dtype == torch.float16 else None,
    )


def _initial_value(plan: Plan, model: Decoder) -> Callable[[str, tuple[slice, ...] | None], Tensor]:
    if plan.opened is None:
        return model.initial_value
    opened = plan.opened
    missing = [name for name in model.shapes if name not in opened.names]
    if missing:
        raise ValueError(
            f"`model_args.model_name` {plan.run.model_args.model_name} lacks {missing[0]} and "
            f"{len(missing) - 1} more tensors of its own architecture"
        )
    return lambda name, region: opened.tensor(name, region).float()


def _build_teacher(plan: Plan, kernels: KernelPolicy) -> Decoder | None:
    args = plan.run.teacher_args
    if args is None:
        return None
    from lme_cli.models import load_model

    return load_model(args.model_name, device=plan.device, dtype=args.torch_dtype, kernels=kernels)


def _build_trackers(plan: Plan, more: Mapping[str, Tracker]) -> Trackers:
    if not plan.is_first:
        return Trackers()
    return build_trackers(
        plan.run.logging_args,
        metrics_path=plan.save_path / "metrics.jsonl",
        config=plan.resolved,
        others=more,
    )


def _build_evaluation(
    plan: Plan,
    runtime: Runtime,
    objective: Objective,
    trackers: Trackers,
    loaders: Loaders,
    tokenizer: TextTokenizer | None,
) -> EvaluateHook | None:
    parameters = plan.run.training_parameters
    if not parameters.eval_during_training:
        return None
    sets = evaluation_sets(loaders, tokenizer)
    return EvaluateHook(runtime, objective, trackers, sets, interval=parameters.eval_interval)


def _build_hooks(
    plan: Plan,
    runtime: Runtime,
    trackers: Trackers,
    throughput: Throughput,
    looks: GuardHook,
    evaluation: EvaluateHook | None,
    checkpointer: Checkpointer,
) -> list[Hook]:
    run = plan.run
    stop = StopHook(
        runtime,
        kill_switch=plan.save_path / KILL_SWITCH,
        stop_after_seconds=run.training_parameters.stop_after_seconds,
    )
    hooks: list[Hook] = [
        stop,
        LogHook(runtime, trackers, throughput, interval=run.logging_args.log_interval),
        looks,
    ]
    if evaluation is not None:
        hooks.append(evaluation)
    hooks.append(SurfaceFailedSaves(checkpointer))
    hooks.append(SaveHook(checkpointer, trackers, interval=run.save_args.save_interval))
    trace = run.logging_args.torch_profiler_trace_path
    if trace is not None and plan.is_first:
        hooks.append(ProfileHook(Path(trace)))
    hooks.append(GarbageCollectionHook())
    return hooks


@dataclass(frozen=True, slots=True)
class _Progress:
    """Tells a watchdog that a save goes on."""

    mark: Callable[[str], None]

    def __call__(self, name: str) -> None:
        self.mark("checkpoint")


class SurfaceFailedSaves:
    """Ends the run at the step after which a save in the background turned out to have failed."""

    def __init__(self, checkpointer: Checkpointer) -> None:
        """Watch a checkpointer."""
        self._checkpointer = checkpointer

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Raise what a save raised; never waits for one."""
        self._checkpointer.check()


def _write_run_files(plan: Plan, run_file: RunFile) -> None:
    plan.save_path.mkdir(parents=True, exist_ok=True)
    resolved = json.dumps(plan.resolved, indent=2, ensure_ascii=False) + "\n"
    for name, text in (("run.yml", run_file.text), ("run.resolved.json", resolved)):
        partial = plan.save_path / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(plan.save_path / name)

"""A checkpoint's losses, measured as during its run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lme_cli.compose import build_model, place_model
from lme_cli.config import RunConfig
from lme_cli.errors import CommandError
from lme_cli.loading import check_run
from lme_cli.overrides import apply_overrides
from lme_cli.planning import make_plan
from lme_cli.run_data import evaluation_sets, open_data
from lme_cli.run_file import RunFile
from lme_cli.run_tokenizer import find_tokenizer
from lme_core.training.args import TrainingParameters
from lme_core.training.batch_plan import BatchPlan
from lme_core.training.evaluation import records
from lme_core.training.objectives import build_objective
from lme_core.training.runtime import Runtime
from lme_kernels.policy import KernelPolicy
from lme_parallel.args import DistributedArgs
from lme_parallel.checkpoint.reader import Checkpoint
from lme_parallel.checkpoint.unshard import iterate_tensors, open_checkpoint


def evaluate_checkpoint(
    path: Path, settings: Sequence[str], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Evaluate a checkpoint on its run's data.

    Args:
        path: A run directory (its newest checkpoint) or a checkpoint.
        settings: Each of the form `section.key=value`, over the run's own settings.
        names: Of `val` and `test`.

    Returns:
        One record a set, as in `metrics.jsonl`.

    Raises:
        CommandError: If the run has no such data.
    """
    checkpoint = open_checkpoint(path)
    saved = RunFile(str(checkpoint.path), checkpoint.document("run.resolved.json"))
    evaluated = ["training_parameters.eval_during_training=true", *settings]
    loaded = check_run(apply_overrides(saved, evaluated))
    run = loaded.run.model_copy(
        update={
            "save_args": dataclasses.replace(
                loaded.run.save_args, save_path=str(checkpoint.path.parent)
            ),
            # In one process, whatever the run had; the same rows as then.
            "distributed_args": DistributedArgs(),
            "training_parameters": _same_batch(loaded.run, checkpoint),
        }
    )
    plan = make_plan(run)
    tokenizer = find_tokenizer(run, plan.opened)
    loaders = open_data(plan, tokenizer)
    sets = evaluation_sets(loaders, tokenizer, names)
    if not sets:
        raise CommandError(f"the run of {checkpoint.path} has no data for {' or '.join(names)}")
    placed = place_model(plan, build_model(plan, KernelPolicy.from_args(run.kernel_args)))
    # Equal in form, not in name: the packages do not know each other's classes.
    runtime = cast(Runtime, placed)
    targets = {**runtime.named_parameters(), **runtime.named_buffers()}
    for name, tensor in iterate_tensors(checkpoint):
        targets[name].data.copy_(tensor)
    runtime.finish_step()
    state = checkpoint.document("state.json")
    pretraining = dataclasses.replace(run.tuning_args, tuning_method="pretraining")
    objective = build_objective(pretraining)
    return records(
        runtime, objective, sets, step=checkpoint.step, tokens=int(state.get("tokens", 0))
    )


def _same_batch(run: RunConfig, checkpoint: Checkpoint) -> TrainingParameters:
    """Fix the size of the run's global batch, which no longer follows from the processes."""
    mesh = checkpoint.document("state.json")["mesh"]
    replicas = mesh["replicate"] * mesh["shard"] // mesh["context"]
    batch = BatchPlan.resolve(run.training_parameters, replicas)
    return dataclasses.replace(
        run.training_parameters,
        micro_batch_size=batch.micro_batch_size,
        gradient_accumulation_steps=None,
        global_batch_size=batch.global_batch_size,
    )

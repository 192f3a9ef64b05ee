"""A whole run, from a checked run file to the report: plan, compose, train, tell."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from lme_cli.display import Progress, duration, print_next, print_table, print_warnings
from lme_cli.loading import Loaded
from lme_cli.quickstart import DEFAULT_PATH
from lme_data.dataset import MegatronDatasetArgs

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

    from lme_cli.compose import Composed
    from lme_cli.planning import Plan
    from lme_parallel.launch import Launch
    from lme_parallel.watchdog.watchdog import Watchdog


def plan_only(loaded: Loaded, launch: "Launch") -> None:
    """Print what a run would do in the processes that `launch` is one of."""
    from lme_cli import flops
    from lme_cli.planning import describe, make_plan

    print_warnings(loaded.warnings)
    plan = make_plan(loaded.run, launch)
    print_table("This run would:", describe(plan, flops.count(plan.model_config)))


def train(loaded: Loaded, *, is_quickstart: bool = False) -> None:
    """Train a run to its end, or until something stops it.

    Args:
        loaded: From `load_run`.
        is_quickstart: Whether it is the embedded default: its data are made first, and three
            completions are printed at the end.
    """
    from lme_cli import logs
    from lme_cli.planning import check_kill_switch, make_plan
    from lme_parallel.launch import barrier, process_group

    run = loaded.run
    plan = make_plan(run)
    logs.configure(
        run.logging_args.logging_level,
        colored=run.logging_args.use_colored_logs,
        rank=plan.launch.rank,
    )
    if plan.is_first:
        print_warnings(loaded.warnings)
    check_kill_switch(plan)
    timeout = run.distributed_args.timeout_minutes
    with process_group(plan.launch, device=plan.device, timeout_minutes=timeout) as store:
        if is_quickstart:
            if plan.is_first:
                _prepare_quickstart(plan)
            barrier(plan.launch)
        _train(plan, loaded, watchdog=_watchdog(plan, store), is_quickstart=is_quickstart)


def _watchdog(plan: "Plan", store: "Store | None") -> "Watchdog | None":
    seconds = plan.run.distributed_args.watchdog_limit()
    if store is None or seconds is None:
        return None
    from lme_parallel.watchdog.watchdog import Watchdog

    return Watchdog(
        store,
        rank=plan.launch.rank,
        world_size=plan.launch.world_size,
        seconds=seconds,
        folder=plan.save_path,
    )


def _prepare_quickstart(plan: "Plan") -> None:
    from lme_cli.quickstart import prepare

    prepare(plan.save_path / "data", vocab_size=plan.model_config.vocab_size, say=print)


def _train(
    plan: "Plan", loaded: Loaded, *, watchdog: "Watchdog | None", is_quickstart: bool
) -> None:
    from lme_cli import flops
    from lme_cli.compose import compose
    from lme_cli.planning import describe

    steps = plan.run.training_parameters.num_training_steps
    if plan.is_first:
        print_table("This run:", describe(plan, flops.count(plan.model_config)))
    progress = {"progress": Progress(steps)} if plan.is_first else {}
    mark = None if watchdog is None else watchdog.mark
    composed = compose(plan, loaded.run_file, trackers=progress, mark=mark)
    started = time.monotonic()
    is_done = composed.state.step >= steps
    try:
        with nullcontext() if watchdog is None else watchdog:
            composed.trainer.fit(composed.state)
    finally:
        composed.trackers.finish()
    if plan.is_first:
        _finish(
            plan,
            composed,
            seconds=time.monotonic() - started,
            was_done=is_done,
            is_quickstart=is_quickstart,
        )


def _finish(
    plan: "Plan", composed: "Composed", *, seconds: float, was_done: bool, is_quickstart: bool
) -> None:
    """Say how it ended, write the report, name what to try next."""
    from lme_cli import flops
    from lme_cli.planning import describe
    from lme_cli.report import write_report

    steps = plan.run.training_parameters.num_training_steps
    if was_done:
        print(f"nothing left to train: step {composed.state.step:,} of {steps:,} is saved")
    elif composed.state.stop_reason is not None:
        print(
            f"stopped after step {composed.state.step:,} of {steps:,}: "
            f"{composed.state.stop_reason}; saved, the same command continues"
        )
    # In several processes all would have to take part.
    samples = _samples(composed) if is_quickstart and plan.topology.is_single else []
    facts = dict(describe(plan, flops.count(plan.model_config)))
    facts["trained for"] = duration(seconds)
    report = write_report(plan.save_path, title=str(plan.save_path), facts=facts, samples=samples)
    print(f"\n{plan.save_path}: step {composed.state.step:,}, {duration(seconds)}; {report}")
    print_next(
        _next_commands(
            plan, has_tokenizer=composed.tokenizer is not None, is_quickstart=is_quickstart
        )
    )


def _samples(composed: "Composed"):
    """Let the model complete three prompts, and print them."""
    from lme_cli.generation import complete
    from lme_cli.quickstart import PROMPTS
    from lme_cli.report import Sample

    if composed.tokenizer is None:
        return []
    samples = []
    for number, prompt in enumerate(PROMPTS):
        completion = complete(
            composed.model, composed.tokenizer, prompt, max_new_tokens=64, seed=number
        )
        samples.append(Sample(prompt, completion))
        print(f"\n--- completion {number + 1} ---\n{prompt}{completion}")
    return samples


def _next_commands(
    plan: "Plan", *, has_tokenizer: bool, is_quickstart: bool
) -> list[tuple[str, str]]:
    """Give three commands that work on what this run left behind."""
    save_path = plan.save_path
    found = []
    if has_tokenizer:
        command = f'lme generate {save_path} --prompt "class Tree:"'
        found.append((command, "write text with the model"))
    command = f"lme unshard {save_path} {save_path}-model"
    found.append((command, "write it as one safetensors directory"))
    if _may_go_on(plan):
        steps = 2 * plan.run.training_parameters.num_training_steps
        command = f"lme train {save_path / 'run.yml'}"
        if is_quickstart:
            moved = str(save_path) != Path(DEFAULT_PATH).name
            command = "lme train" + (f" --set save_args.save_path={save_path}" if moved else "")
        command += f" --set training_parameters.num_training_steps={steps}"
        found.append((command, "train for longer, from where it stands"))
    found.append((f"lme evaluate {save_path}", "measure it on its validation and test data"))
    found.append((f"lme config show {save_path / 'run.yml'}", "see every setting it ran with"))
    return found[:3]


def _may_go_on(plan: "Plan") -> bool:
    """Say whether more steps leave the order of the data as it is."""
    return all(
        isinstance(each, MegatronDatasetArgs) and each.class_args.order == "stable"
        for each in plan.run.datasets
    )

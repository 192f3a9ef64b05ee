"""`lme train`, and its namesakes by method: `pretrain`, `finetune`, `distill`."""

from pathlib import Path
from typing import Annotated

import typer

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B.C=VALUE", help="Replace one setting; may be repeated."),
]
NprocOption = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Processes to start on this host.")
]
PlanOption = Annotated[
    bool,
    typer.Option("--plan", "--dry-run", help="Only show what the run would do."),
]
ConfigOption = Annotated[Path, typer.Option("--config", help="The run file.")]


def train(
    run_file: Annotated[
        Path | None, typer.Argument(help="A run file; none: the embedded small run.")
    ] = None,
    settings: SetOption = None,
    nproc: NprocOption = None,
    is_plan: PlanOption = False,
) -> None:
    """Train a model; the method is the run file's `tuning_method`.

    Without a run file it trains a small model on the source code of Python's standard library.
    The same command continues a run that was stopped.
    """
    _start(run_file, settings, nproc=nproc, is_plan=is_plan, method=None)


def pretrain(
    run_file: ConfigOption,
    settings: SetOption = None,
    nproc: NprocOption = None,
    is_plan: PlanOption = False,
) -> None:
    """Train with `tuning_method: pretraining`."""
    _start(run_file, settings, nproc=nproc, is_plan=is_plan, method="pretraining")


def finetune(
    run_file: ConfigOption,
    settings: SetOption = None,
    nproc: NprocOption = None,
    is_plan: PlanOption = False,
) -> None:
    """Train with `tuning_method: full_finetuning`."""
    _start(run_file, settings, nproc=nproc, is_plan=is_plan, method="full_finetuning")


def distill(
    run_file: ConfigOption,
    settings: SetOption = None,
    nproc: NprocOption = None,
    is_plan: PlanOption = False,
) -> None:
    """Train with `tuning_method: distillation`."""
    _start(run_file, settings, nproc=nproc, is_plan=is_plan, method="distillation")


def _start(
    path: Path | None,
    settings: list[str] | None,
    *,
    nproc: int | None,
    is_plan: bool,
    method: str | None,
) -> None:
    import os

    from lme_cli.errors import CommandError
    from lme_cli.launching import find_hosts, launch_workers
    from lme_cli.loading import check_run
    from lme_cli.overrides import apply_overrides
    from lme_cli.quickstart import load_default
    from lme_cli.run import plan_only
    from lme_cli.run import train as run_training
    from lme_cli.run_file import load
    from lme_parallel.failures import follow_launcher, report_failure

    given = settings or []
    follow_launcher(os.environ)
    try:
        hosts = find_hosts(nproc, os.environ)
        run_file = load_default(given) if path is None else apply_overrides(load(path), given)
        loaded = check_run(run_file, world_size=hosts.world_size)
        found = loaded.run.tuning_args.tuning_method
        if method is not None and found != method:
            raise CommandError(
                f"`tuning_args.tuning_method` of {path} is `{found}`, not `{method}`; use"
                " `lme train`"
            )
        if is_plan:
            plan_only(loaded, hosts.first_worker())
        elif hosts.starts_workers:
            launch_workers(hosts, run_arguments(path, given, method))
        else:
            run_training(loaded, is_quickstart=path is None)
    except BaseException as error:
        report_failure(error)
        raise


def run_arguments(path: Path | None, settings: list[str], method: str | None) -> list[str]:
    """Return the arguments with which each process of a run is started.

    Args:
        path: The run file.
        settings: Of `--set`.
        method: `None` for `lme train`.
    """
    command = {None: "train", "full_finetuning": "finetune", "distillation": "distill"}.get(
        method, "pretrain"
    )
    file = [] if path is None else [str(path)] if method is None else ["--config", str(path)]
    return [command, *file, *(word for each in settings for word in ("--set", each))]

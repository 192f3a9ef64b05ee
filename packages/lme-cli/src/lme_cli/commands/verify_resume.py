"""`lme verify-resume`: proof that a run survives being stopped."""

from pathlib import Path
from typing import Annotated

import typer

from lme_cli.commands.train import SetOption


def verify_resume(
    run_file: Annotated[
        Path | None, typer.Argument(help="A run file; none: the embedded small run.")
    ] = None,
    settings: SetOption = None,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Optimizer steps to train.")] = 20,
    cut: Annotated[
        str, typer.Option("--cut", metavar="N,M", help="Steps after which the second run is cut.")
    ] = "7,13",
) -> None:
    """Train a few steps straight, and again with cuts, and compare every bit.

    The run's own directory is not touched. Exit code 1 if anything differs.
    """
    from lme_cli.display import print_table
    from lme_cli.errors import CommandError
    from lme_cli.resume_check import load_for_check, verify_resume

    try:
        cuts = [int(each) for each in cut.split(",") if each.strip()]
    except ValueError:
        raise CommandError(f"`--cut` must be steps such as 7,13, got {cut}") from None
    findings = verify_resume(load_for_check(run_file, settings or []), steps=steps, cuts=cuts)
    print_table(
        f"{steps} steps, straight and cut after {', '.join(map(str, cuts))}:",
        [
            (each.name, f"{each.count:,} the same" if each.difference is None else "DIFFER")
            for each in findings
        ],
    )
    wrong = [each for each in findings if each.difference is not None]
    if wrong:
        raise CommandError(
            f"the resumed run is another one; first difference in {wrong[0].name}:"
            f" {wrong[0].difference}"
        )
    print("the resumed run is the same, bit for bit")

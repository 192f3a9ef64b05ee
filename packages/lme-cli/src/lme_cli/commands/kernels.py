"""`lme kernels`: which operations have which implementations, and whether they are right here."""

from typing import Annotated

import typer

app = typer.Typer(help="List and check the kernels.", no_args_is_help=True)


@app.command("list")
def list_command() -> None:
    """Print every implementation, whether it runs on this machine, and where it is proven."""
    from lme_cli.kernel_list import kernel_table

    print(kernel_table())


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Ops; all if none.")] = None,
) -> None:
    """Compare every implementation that can run here with its reference, values and gradients."""
    from lme_cli.kernel_check import check_kernels

    if not check_kernels(names or []):
        raise typer.Exit(1)

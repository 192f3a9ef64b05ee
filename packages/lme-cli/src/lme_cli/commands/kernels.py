"""`lme kernels`: which operations have which implementations, and whether they are right here."""

from typing import Annotated

import typer

app = typer.Typer(help="List and check the kernels.", no_args_is_help=True)


@app.command("list")
def list_command() -> None:
    """Print ops and back ends, and what can run on this machine."""
    from lme_kernels import device
    from lme_kernels.inspection import table
    from lme_kernels.op import Backend

    print(table())
    for backend in Backend:
        if backend is Backend.TORCH:
            continue
        reasons = {kind: device.why_unavailable(backend, kind) for kind in device.types_here()}
        usable = [kind for kind, reason in reasons.items() if reason is None]
        if usable:
            print(f"{backend}: usable on {', '.join(usable)}")
        else:
            print(
                f"{backend}: not usable here: {'; '.join(dict.fromkeys(map(str, reasons.values())))}"
            )


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Ops; all if none.")] = None,
) -> None:
    """Compare every implementation that can run here with its reference, values and gradients."""
    from lme_cli.kernel_check import check_kernels

    if not check_kernels(names or []):
        raise typer.Exit(1)

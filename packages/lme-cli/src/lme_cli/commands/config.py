"""`lme config`: check, show and document run files."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check, show and document run files.", no_args_is_help=True)

RunFileArgument = Annotated[Path | None, typer.Argument(help="A run file; none: the embedded one.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B.C=VALUE", help="Replace one setting; may be repeated."),
]


@app.command()
def check(
    run_file: Annotated[Path, typer.Argument(help="The run file.")],
    settings: SetOption = None,
    fragment: Annotated[
        bool, typer.Option("--fragment", help="Check the sections that are there.")
    ] = False,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Check the layout for this many processes too.")
    ] = None,
) -> None:
    """Check a run file: spelling, types, ranges, and what sections say together.

    Paths and names are taken as they stand; `lme train` checks what they lead to.
    """
    from lme_cli.display import print_warnings
    from lme_cli.loading import check_fragment, check_run, is_unshard, load_unshard
    from lme_cli.overrides import apply_overrides
    from lme_cli.run_file import load

    read = apply_overrides(load(run_file), settings or [])
    if is_unshard(read):
        load_unshard(run_file, settings or [])
        print(f"{run_file}: fine")
        return
    loaded = check_fragment(read) if fragment else check_run(read, world_size=nproc)
    print_warnings(loaded.warnings)
    if loaded.missing:
        listed = ", ".join(f"`{name}`" for name in loaded.missing)
        print(f"{run_file}: fine as a fragment; a whole run file also needs {listed}")
    else:
        print(f"{run_file}: fine")


@app.command()
def show(run_file: RunFileArgument = None, settings: SetOption = None) -> None:
    """Print a run file with every default filled in and the origin of each value."""
    from lme_cli.display import print_warnings
    from lme_cli.loading import check_run, is_unshard, load_unshard
    from lme_cli.overrides import apply_overrides
    from lme_cli.quickstart import load_default
    from lme_cli.resolved import show as render
    from lme_cli.run_file import load

    if run_file is None:
        read = load_default(settings or [])
    else:
        read = apply_overrides(load(run_file), settings or [])
        if is_unshard(read):
            print(render(load_unshard(run_file, settings or []), read))
            return
    loaded = check_run(read)
    print_warnings(loaded.warnings)
    print(render(loaded.run, loaded.run_file))


@app.command()
def schema(
    is_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a page to read instead.")
    ] = False,
) -> None:
    """Print the JSON schema of run files, for editors; descriptions are the settings' own."""
    import json

    from lme_cli.json_schema import describe
    from lme_cli.reference import render

    if is_markdown:
        print(render(), end="")
    else:
        print(json.dumps(describe(), indent=2))

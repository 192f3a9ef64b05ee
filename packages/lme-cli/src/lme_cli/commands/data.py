"""`lme data`: tokenise text, look into token files, verify and merge them."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Tokenise text; inspect, verify and merge token files.", no_args_is_help=True
)

PrefixArgument = Annotated[Path, typer.Argument(help="Prefix of a `.bin/.idx` pair.")]


@app.command()
def inspect(prefix: PrefixArgument) -> None:
    """Print sizes, dtype, tokenizer and lengths of documents."""
    from lme_cli.data_views import inspect_pair

    for name, value in inspect_pair(prefix):
        print(f"{name:<16} {value}")


@app.command()
def verify(prefix: PrefixArgument) -> None:
    """Check structure, and with a manifest every checksum; exit code 1 if anything is wrong."""
    from lme_data.manifest import verify as verify_pair

    report = verify_pair(prefix)
    for fault in report.faults:
        print(f"fault: {fault}")
    if report.faults:
        raise typer.Exit(1)
    checked = (
        f"{report.bytes_checked:,} bytes by checksum"
        if report.has_manifest
        else ("structure only: there is no manifest")
    )
    print(
        f"{prefix}: sound; {report.num_documents:,} documents, {report.num_tokens:,} tokens, "
        f"{checked}"
    )


@app.command()
def merge(
    prefixes: Annotated[list[Path], typer.Argument(help="Prefixes of the pairs to merge.")],
    output_prefix: Annotated[Path, typer.Option(help="Prefix of the pair to write.")],
) -> None:
    """Write several pairs of one dtype as one, in the given order."""
    from lme_cli.data_views import merge_pairs

    manifest = merge_pairs(prefixes, output_prefix)
    print(f"{output_prefix}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens")


@app.command()
def preview(
    run_file: Annotated[Path, typer.Argument(help="A run file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B.C=VALUE", help="Replace one setting."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a row to show.")] = 200,
) -> None:
    """Show the first rows a run would train on, decoded, with what is a target and what is not."""
    from lme_cli.data_views import preview_rows

    for text in preview_rows(run_file, settings or [], count=count, max_tokens=max_tokens):
        print(text)

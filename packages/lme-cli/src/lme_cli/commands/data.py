"""`lme data`: tokenise text, look into token files, verify and merge them."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Tokenise text; inspect, verify and merge token files.", no_args_is_help=True
)

PrefixArgument = Annotated[Path, typer.Argument(help="Prefix of a `.bin/.idx` pair.")]


@app.command()
def tokenize(
    inputs: Annotated[
        list[Path], typer.Argument(help="Files and folders: JSON lines, parquet, text.")
    ],
    tokenizer: Annotated[str, typer.Option(help="A `tokenizer.json`, its folder, or a hub name.")],
    output_prefix: Annotated[Path, typer.Option(help="Prefix of the `.bin/.idx` pair to write.")],
    json_key: Annotated[
        list[str] | None, typer.Option(help="Key or column of the text; may be repeated.")
    ] = None,
    documents: Annotated[
        str, typer.Option(help="What one document of a text file is: file, paragraph or line.")
    ] = "file",
    is_without_eod: Annotated[
        bool, typer.Option("--no-eod", help="Do not end documents with the end-of-text token.")
    ] = False,
    num_processes: Annotated[
        int, typer.Option(min=0, help="Processes that encode; 0 uses threads.")
    ] = 0,
) -> None:
    """Turn text into token files; started again after a stop, it goes on where it was."""
    from lme_cli.tokenizing import tokenize as run

    run(
        inputs,
        tokenizer,
        output_prefix,
        json_keys=json_key or ["text"],
        documents=documents,
        append_eod=not is_without_eod,
        num_processes=num_processes,
    )


@app.command()
def inspect(prefix: PrefixArgument) -> None:
    """Print sizes, dtype, tokenizer and lengths of documents."""
    from lme_cli.data_views import describe_pair

    for name, value in describe_pair(prefix):
        print(f"{name:<11} {value}")


@app.command()
def verify(prefix: PrefixArgument) -> None:
    """Check structure, and with a manifest every checksum; exit code 1 if anything is wrong."""
    from lme_data.manifest import verify as verify_pair

    report = verify_pair(prefix)
    for fault in report.faults:
        print(f"fault: {fault}")
    if report.faults:
        raise typer.Exit(1)
    checked = "structure only: there is no manifest"
    if report.has_manifest:
        checked = f"{report.bytes_checked:,} bytes by checksum"
    print(
        f"{prefix}: sound; {report.num_documents:,} documents, {report.num_tokens:,} tokens; "
        f"{checked}"
    )


@app.command()
def merge(
    prefixes: Annotated[list[Path], typer.Argument(help="Prefixes of the pairs to merge.")],
    output_prefix: Annotated[Path, typer.Option(help="Prefix of the pair to write.")],
) -> None:
    """Write several pairs of one dtype as one, in the given order."""
    from lme_data.merging import merge_corpora

    manifest = merge_corpora(prefixes, output_prefix)
    print(f"{output_prefix}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens")


@app.command()
def preview(
    source: Annotated[
        Path, typer.Argument(help="A run file (`.yml`), or the prefix of a `.bin/.idx` pair.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B.C=VALUE", help="Replace one setting of the run file."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="What decodes a pair; ids are shown without one.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Rows or documents to show.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each to show.")] = 200,
) -> None:
    """Show the first rows a run would train on, or the first documents of a pair.

    Of a run's rows, what is no target stands in double brackets.
    """
    from lme_cli.data_views import preview_documents, preview_rows

    if source.suffix in (".yml", ".yaml"):
        shown = preview_rows(source, settings or [], count=count, max_tokens=max_tokens)
    else:
        shown = preview_documents(source, tokenizer, count=count, max_tokens=max_tokens)
    for text in shown:
        print(text)

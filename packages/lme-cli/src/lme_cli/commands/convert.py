"""`lme convert`: models from and to HuggingFace, with proof."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Translate models from and to HuggingFace.", no_args_is_help=True)

DtypeOption = Annotated[
    str | None, typer.Option(help="Floating point type to write; as stored if absent.")
]
ToleranceOption = Annotated[
    float | None, typer.Option(min=0.0, help="Largest logit difference allowed, in fp32.")
]
ShardOption = Annotated[
    int | None, typer.Option("--max-shard-bytes", min=1, help="Tensor bytes in one file.")
]
UncertifiedOption = Annotated[
    bool, typer.Option("--uncertified", help="Do not run both models to compare them.")
]


@app.command("import")
def import_command(
    source: Annotated[str, typer.Argument(help="A HuggingFace model directory, or a hub name.")],
    destination: Annotated[Path, typer.Argument(help="The model directory to make.")],
    dtype: DtypeOption = None,
    tolerance: ToleranceOption = None,
    max_shard_bytes: ShardOption = None,
    is_uncertified: UncertifiedOption = False,
) -> None:
    """Translate a HuggingFace model into a model directory of ours."""
    from lme_convert.api import import_from_hf

    options = _options(dtype, tolerance, max_shard_bytes, is_uncertified)
    _report(import_from_hf(source, destination, **options), destination)


@app.command("export")
def export_command(
    source: Annotated[Path, typer.Argument(help="A model directory of ours.")],
    destination: Annotated[Path, typer.Argument(help="The directory to make.")],
    model_type: Annotated[
        str | None, typer.Option(help="HuggingFace family; the one it came from if absent.")
    ] = None,
    dtype: DtypeOption = None,
    tolerance: ToleranceOption = None,
    max_shard_bytes: ShardOption = None,
    is_uncertified: UncertifiedOption = False,
) -> None:
    """Translate a model directory of ours into one that `transformers` opens."""
    from lme_convert.api import export_to_hf

    options = _options(dtype, tolerance, max_shard_bytes, is_uncertified)
    _report(export_to_hf(source, destination, model_type, **options), destination)


def _options(
    dtype: str | None, tolerance: float | None, max_shard_bytes: int | None, is_uncertified: bool
) -> dict[str, Any]:
    """Give the keyword arguments that were asked for; the others keep lme-convert's defaults."""
    from lme_cli.certifying import build_for_certificate
    from lme_core.training.args import parse_dtype

    options: dict[str, Any] = {}
    if not is_uncertified:
        options["build_model"] = build_for_certificate
    if dtype is not None:
        options["dtype"] = parse_dtype("--dtype", dtype)
    if tolerance is not None:
        options["tolerance"] = tolerance
    if max_shard_bytes is not None:
        options["max_shard_bytes"] = max_shard_bytes
    return options


def _report(certificate: Any, destination: Path) -> None:
    """Print the certificate, which is lme-convert's."""
    print(f"{destination}: {certificate.status}")
    for name, value in certificate.to_dict().items():
        if value is not None and name != "status":
            print(f"  {name}: {value}")

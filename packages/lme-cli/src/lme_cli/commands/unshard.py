"""`lme unshard`: from a training checkpoint to a model directory."""

from pathlib import Path
from typing import Annotated

import typer

from lme_cli.commands.train import SetOption


def unshard(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A run directory or a checkpoint in it.")
    ] = None,
    out: Annotated[Path | None, typer.Argument(help="The model directory to make.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A run file with `load_args`, in their place.")
    ] = None,
    settings: SetOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="Floating point type to write: fp32, bf16 or fp16.")
    ] = None,
) -> None:
    """Write a checkpoint's model as safetensors, with its config and tokenizer."""
    from lme_cli.errors import CommandError
    from lme_cli.loading import load_unshard
    from lme_cli.unsharding import write_model
    from lme_core.training.args import parse_dtype
    from lme_parallel.checkpoint.unshard import open_checkpoint

    if config is not None:
        if checkpoint is not None or out is not None or dtype is not None:
            raise CommandError("give either `--config` or CHECKPOINT, OUT and `--dtype`, not both")
        args = load_unshard(config, settings or [])
        opened = open_checkpoint(args.load_args.load_path, args.load_args.iteration)
        target, chosen = Path(args.unsharded_path), args.mixed_precision_args.torch_dtype
    elif checkpoint is not None and out is not None:
        if settings:
            raise CommandError("`--set` changes a run file; give one with `--config`")
        opened, target = open_checkpoint(checkpoint), out
        chosen = parse_dtype("--dtype", dtype or "fp32")
    else:
        raise CommandError("give CHECKPOINT and OUT, or `--config` with a run file")
    write_model(opened, target, dtype=chosen)
    print(f"{target}: step {opened.step} of {opened.path.parent}")

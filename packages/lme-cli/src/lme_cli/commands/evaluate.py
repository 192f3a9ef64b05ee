"""`lme evaluate`: losses of a checkpoint on its run's validation and test data."""

from pathlib import Path
from typing import Annotated

import typer

from lme_cli.commands.train import SetOption


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A run directory or a checkpoint in it.")],
    settings: SetOption = None,
    split: Annotated[str, typer.Option(help="val, test or both.")] = "both",
) -> None:
    """Print one JSON object per dataset: mean loss in nats, bits per byte where they are known.

    The data and the batch are the run's own; `--set` replaces settings, for instance
    `--set datasets.0.class_args.eval_steps=100`.
    """
    import json

    from lme_cli.errors import CommandError
    from lme_cli.evaluation import evaluate_checkpoint

    if split not in ("val", "test", "both"):
        raise CommandError(f"`--split` must be val, test or both, got {split}")
    names = ("val", "test") if split == "both" else (split,)
    for record in evaluate_checkpoint(checkpoint, settings or [], names):
        print(json.dumps(record))

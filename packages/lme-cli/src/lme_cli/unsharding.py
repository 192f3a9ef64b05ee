"""A checkpoint's model as a model directory, one tensor at a time."""

import logging
from pathlib import Path

import torch

from lme_cli.models import tokenizer_directory
from lme_convert.directory import write_model_directory
from lme_parallel.checkpoint.reader import Checkpoint
from lme_parallel.checkpoint.unshard import iterate_tensors

logger = logging.getLogger(__name__)


def write_model(checkpoint: Checkpoint, target: Path, *, dtype: torch.dtype | None) -> None:
    """Write a model directory; it appears when it is complete.

    Args:
        checkpoint: What to write.
        target: Directory to make.
        dtype: Floating point tensors are written in it; `None` keeps the saved one.
    """
    tokenizer = tokenizer_directory(checkpoint.document("run.resolved.json"))
    if tokenizer is None:
        logger.warning("no tokenizer files copied: the run names none on this disk")
    write_model_directory(
        target,
        checkpoint.document("config.json"),
        iterate_tensors(checkpoint, dtype),
        tokenizer_from=tokenizer,
    )

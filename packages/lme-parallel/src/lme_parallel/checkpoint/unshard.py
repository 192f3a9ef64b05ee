"""The model inside a checkpoint, one tensor at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lme_parallel.checkpoint.errors import CheckpointError
from lme_parallel.checkpoint.layout import checkpoint_directory, step_of
from lme_parallel.checkpoint.reader import Checkpoint, newest_valid


def open_checkpoint(path: Path | str, iteration: int | None = None) -> Checkpoint:
    """Open a checkpoint directory, or the newest valid one of a run directory.

    Args:
        path: `.../global_step{N}`, or the directory that holds such.
        iteration: Step, where `path` is a run directory; `None` takes the newest.

    Raises:
        CheckpointError: If there is none, or it is not whole.
    """
    path = Path(path)
    if step_of(path) is not None:
        if iteration not in (None, step_of(path)):
            raise CheckpointError(f"{path} is not of step {iteration}")
        return Checkpoint(path)
    if iteration is not None:
        return Checkpoint(checkpoint_directory(path, iteration))
    checkpoint = newest_valid(path)
    if checkpoint is None:
        raise CheckpointError(
            f"{path} holds no committed checkpoint; name the directory that holds `global_step*`,"
            " or one of those"
        )
    return checkpoint


def iterate_tensors(
    checkpoint: Checkpoint | Path | str, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter and buffer of the model, by name, on the CPU.

    Only one tensor is held at a time, if the caller drops it.

    Args:
        checkpoint: Open, or its directory, or that of a run.
        dtype: Floating point tensors are converted to it; `None` leaves them as saved.

    Yields:
        Name and tensor, in the order of names.

    Raises:
        CheckpointError: If the checkpoint is damaged.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    for name in checkpoint.names("model"):
        layout = checkpoint.layout(f"model/{name}")
        converted = layout.dtype
        if dtype is not None and layout.dtype.is_floating_point:
            converted = dtype
        tensor = torch.empty(layout.shape, dtype=converted)
        checkpoint.read([(f"model/{name}", None, tensor)])
        yield name, tensor
        del tensor

"""Models for use after training, from a model directory, a run directory or a checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lme_cli.errors import CommandError
from lme_convert.api import open_model
from lme_core.architectures.decoder import Decoder
from lme_core.config import from_dict
from lme_data.tokenizer import TextTokenizer, load_tokenizer
from lme_kernels.policy import KernelPolicy
from lme_parallel.checkpoint.layout import checkpoint_steps, step_of
from lme_parallel.checkpoint.reader import Checkpoint
from lme_parallel.checkpoint.unshard import iterate_tensors, open_checkpoint


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's config, tensors and tokenizer are."""

    config: Mapping[str, Any]
    """Contents of `config.json`."""
    fill: Callable[[Mapping[str, Tensor]], None]
    """Writes every tensor into the given ones, by name."""
    tokenizer_name: str | None
    """File, folder or hub name of the tokenizer, where it is known."""
    description: str
    """What it is, in words."""


def find_model(name: str) -> Source:
    """Find a model by the path or name that a user gave.

    Args:
        name: A model directory, a run directory (its newest checkpoint), a checkpoint, or the
            name of a model on the hub.

    Raises:
        CommandError: If a directory is none of these.
    """
    path = Path(name)
    if is_checkpoint(path):
        return _from_checkpoint(open_checkpoint(path))
    if path.exists() and not (path / "config.json").exists():
        raise CommandError(
            f"{name} is neither a model directory (it has no `config.json`) nor a run directory "
            "(it has no `global_step*`)"
        )
    opened = open_model(name)

    def fill(targets: Mapping[str, Tensor]) -> None:
        for each, target in targets.items():
            target.copy_(opened.tensor(each))

    return Source(opened.config, fill, str(opened.tokenizer_path), f"model {name}")


def is_checkpoint(path: Path) -> bool:
    """Say whether a path is a checkpoint or a directory with checkpoints."""
    return step_of(path.absolute()) is not None or bool(checkpoint_steps(path))


def load_model(
    name: str | Source,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kernels: KernelPolicy | None = None,
) -> Decoder:
    """Load a model for inference.

    Args:
        name: As in `find_model`, or what that found.
        device: Where to.
        dtype: Of the parameters.
        kernels: Which implementations run; all automatic if `None`.
    """
    source = find_model(name) if isinstance(name, str) else name
    with torch.device("meta"):
        model = from_dict(source.config).build(kernels or KernelPolicy())
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        source.fill(model.state_dict())
    return model.eval()


def load_tokenizer_of(source: Source, given: str | None) -> TextTokenizer:
    """Load the tokenizer that was given, or else the model's own.

    Raises:
        CommandError: If there is none.
    """
    name = given or source.tokenizer_name
    if name is None:
        raise CommandError(f"no tokenizer is known for {source.description}; give `--tokenizer`")
    return load_tokenizer(name)


def pick_device(name: str | None) -> torch.device:
    """Give the device of that name, or this machine's accelerator, or the CPU."""
    if name is not None:
        return torch.device(name)
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def tokenizer_directory(resolved: Mapping[str, Any]) -> Path | None:
    """Give the folder of a run's tokenizer files, where they are on this disk."""
    name = (resolved.get("tokenizer_args") or {}).get("tokenizer_name")
    name = name or (resolved.get("model_args") or {}).get("model_name")
    if name is None or not Path(name).exists():
        return None
    path = Path(name)
    return path if path.is_dir() else path.parent


def _from_checkpoint(checkpoint: Checkpoint) -> Source:
    def fill(targets: Mapping[str, Tensor]) -> None:
        for name, tensor in iterate_tensors(checkpoint):
            targets[name].copy_(tensor)

    resolved = checkpoint.document("run.resolved.json")
    name = (resolved.get("tokenizer_args") or {}).get("tokenizer_name")
    name = name or (resolved.get("model_args") or {}).get("model_name")
    description = f"step {checkpoint.step} of {checkpoint.path.parent}"
    return Source(checkpoint.document("config.json"), fill, name, description)

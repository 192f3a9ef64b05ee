"""Open, import, export and certify models."""

import datetime
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lme_convert
from lme_convert.certificate import DEFAULT_TOLERANCE, BuildModel, Certificate, certify
from lme_convert.directory import (
    FORMAT_VERSION,
    ModelDirectory,
    Region,
    resolve_region,
    write_contents,
)
from lme_convert.errors import ConversionError, UnsupportedModelError
from lme_convert.families import FAMILIES
from lme_convert.family import Family
from lme_convert.files import read_json_object, write_json
from lme_convert.hub import resolve
from lme_convert.layout import UNROUNDED, with_defaults
from lme_convert.plan import Step, check_export, check_import, make_steps, read_ours, read_theirs
from lme_convert.rules import Rename
from lme_convert.settings import Settings
from lme_convert.shards import DEFAULT_SHARD_BYTES
from lme_convert.staging import staged_directory

__all__ = [
    "OpenedModel",
    "certify",
    "convert_hf_to_lm_engine",
    "convert_lm_engine_to_hf",
    "export_to_hf",
    "import_from_hf",
    "open_model",
]

CONVERSION_FILE = "conversion.json"


class OpenedModel(Mapping[str, Tensor]):
    """A model in our names and layouts, whichever it is on disk; tensors are read when asked for.

    As a mapping it gives whole tensors by name.

    Args:
        directory: Where the tensors are.
        config: Our `config.json`.
        steps: How ours are made of theirs; `None` where the directory is ours.
    """

    def __init__(
        self, directory: ModelDirectory, config: dict[str, Any], steps: list[Step] | None
    ) -> None:
        self.config = config
        """Our `config.json`, with `model_type` and `format_version`."""
        self.tokenizer_path = directory.path
        """Directory with the tokenizer files, where there are any."""
        self._directory = directory
        self._step_of = {name: step for step in steps or () for name in step.ours}
        self.names = tuple(self._step_of) if steps is not None else directory.names
        """Names of all tensors."""

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def tensor(self, name: str, region: Region | None = None) -> Tensor:
        """Read a tensor or a rectangular part of it.

        Only the bytes of the region are read where a tensor is stored as it is; one that is made
        of several of theirs is made whole, then cut.

        Args:
            name: As in `names`.
            region: One slice a dim, step 1; `None` is everything.

        Returns:
            CPU tensor, dtype as stored.

        Raises:
            ConversionError: If there is no such tensor or it cannot be read.
            ValueError: If `region` leaves the tensor.
        """
        step = self._step_of.get(name)
        if step is None:
            return self._directory.tensor(name, region)
        if isinstance(step.transform, Rename):
            return self._directory.tensor(step.theirs[step.ours.index(name)], region)
        whole = dict(read_ours(self._directory, [step]))[name]
        bounds = resolve_region(name, whole.shape, region)
        part = whole[tuple(slice(start, stop) for start, stop in bounds)]
        # A view would keep the whole alive.
        return part if region is None else part.clone()


def open_model(name_or_path: str | Path, *, revision: str | None = None) -> OpenedModel:
    """Open a model directory, ours or of a HuggingFace family, or a model by its hub name.

    Args:
        name_or_path: Directory, or a name on the hub.
        revision: Branch, tag or commit on the hub.

    Raises:
        ConversionError: If the directory is malformed, not of a known family, or of a variant
            that we cannot express; the message names the file, tensor or setting.
        HubError: If a model could not be fetched by name.
    """
    directory = ModelDirectory(resolve(name_or_path, revision=revision))
    if directory.is_ours:
        return OpenedModel(directory, directory.config, None)
    _, config, steps = _plan_import(directory)
    return OpenedModel(directory, config, steps)


def import_from_hf(
    source: str | Path,
    destination: str | Path,
    *,
    build_model: BuildModel | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    revision: str | None = None,
) -> Certificate:
    """Translate a HuggingFace model into a model directory of ours.

    Tensor by tensor: memory is that of the largest rule's tensors, whatever the model. The
    destination appears when it is complete and, with `build_model`, proven.

    Args:
        source: Directory, or a name on the hub.
        destination: Directory to make.
        build_model: Builds our model for the certificate; `None` leaves it uncertified.
        tolerance: See `lme_convert.certificate.DEFAULT_TOLERANCE`.
        dtype: Floating-point tensors are rounded to it; `None` keeps them as they are.
        max_shard_bytes: Tensor bytes in one file.
        revision: Branch, tag or commit on the hub.

    Returns:
        The certificate, as in `conversion.json`.

    Raises:
        ConversionError: If anything does not fit; nothing is left behind.
        HubError: If the model could not be fetched by name.
    """
    path = resolve(source, revision=revision)
    with ModelDirectory(path) as directory:
        if directory.is_ours:
            raise ConversionError(f"`{path}` already is a model directory of ours")
        family, config, steps = _plan_import(directory)
        with staged_directory(Path(destination)) as staging:
            tensors = _cast(read_ours(directory, steps), dtype)
            write_contents(staging, config, tensors, max_shard_bytes, path)
            certificate = certify(path, staging, build_model, tolerance=tolerance, rounded_to=dtype)
            _write_record(staging, str(source), family, "import", certificate, config, dtype)
    return certificate


def export_to_hf(
    source: str | Path,
    destination: str | Path,
    model_type: str | None = None,
    *,
    build_model: BuildModel | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Certificate:
    """Translate a model directory of ours into one that `transformers` opens.

    Args:
        source: Directory of ours; a training checkpoint goes through `lme unshard` first.
        destination: Directory to make.
        model_type: HuggingFace family; `None` takes the one it was imported from, else the first
            that can express the model.
        build_model: As in `import_from_hf`.
        tolerance: As in `import_from_hf`.
        dtype: As in `import_from_hf`.
        max_shard_bytes: As in `import_from_hf`.

    Returns:
        The certificate, as in `conversion.json`.

    Raises:
        ConversionError: If anything does not fit; nothing is left behind.
    """
    path = Path(source)
    with ModelDirectory(path) as directory:
        if not directory.is_ours:
            raise ConversionError(
                f"`{path}` has `model_type` {directory.model_type}, which is not one of ours"
            )
        family, config = _choose_family(directory, model_type)
        steps = make_steps(family, directory.config)
        check_export(family, steps, directory.config, directory)
        stored = dtype or _main_dtype(directory)
        config |= {"torch_dtype": str(stored).removeprefix("torch.")}
        with staged_directory(Path(destination)) as staging:
            tensors = _cast(read_theirs(directory, steps), dtype)
            write_contents(staging, config, tensors, max_shard_bytes, path)
            certificate = certify(path, staging, build_model, tolerance=tolerance, rounded_to=dtype)
            _write_record(staging, str(source), family, "export", certificate, config, dtype)
    return certificate


def convert_hf_to_lm_engine(model_name: str, output_path: str) -> None:
    """Import under its name in lm-engine's documentation; see `import_from_hf`."""
    import_from_hf(model_name, output_path)


def convert_lm_engine_to_hf(checkpoint_path: str, output_path: str, model_type: str) -> None:
    """Export under its name in lm-engine's documentation; see `export_to_hf`."""
    export_to_hf(checkpoint_path, output_path, model_type)


def _plan_import(directory: ModelDirectory) -> tuple[Family, dict[str, Any], list[Step]]:
    family = _family(directory.model_type, directory.path)
    settings = Settings(directory.config, family.model_type)
    translated = family.import_config(settings)
    config = {"model_type": translated.pop("model_type"), "format_version": FORMAT_VERSION}
    config |= translated
    steps = make_steps(family, config)
    check_import(family, steps, config, directory)
    return family, config, steps


def _family(model_type: str, where: str | Path) -> Family:
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"`model_type` {model_type!r} of `{where}` is not supported; known families are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def _choose_family(
    directory: ModelDirectory, model_type: str | None
) -> tuple[Family, dict[str, Any]]:
    if model_type is not None:
        family = _family(model_type, "the export")
        return family, _export_config(family, directory)
    refusals, origin = [], _origin(directory)
    for family in sorted(FAMILIES.values(), key=lambda each: each.model_type != origin):
        try:
            return family, _export_config(family, directory)
        except UnsupportedModelError as error:
            refusals.append(f"{family.model_type}: {error}")
    raise UnsupportedModelError(
        f"no family can express `{directory.path}`:\n  " + "\n  ".join(refusals)
    )


def _origin(directory: ModelDirectory) -> str | None:
    record = directory.path / CONVERSION_FILE
    return str(read_json_object(record).get("family")) if record.exists() else None


def _export_config(family: Family, directory: ModelDirectory) -> dict[str, Any]:
    translated = family.export_config(
        Settings(with_defaults(directory.config), str(directory.path))
    )
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **translated,
    }


def _main_dtype(directory: ModelDirectory) -> torch.dtype:
    """Dtype of most elements."""
    sizes: Counter[torch.dtype] = Counter()
    for name in directory.names:
        sizes[directory.dtype(name)] += torch.Size(directory.shape(name)).numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def _cast(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        cast = dtype is not None and tensor.is_floating_point() and not name.endswith(UNROUNDED)
        yield name, tensor.to(dtype) if cast else tensor
        # Or it would live until the next one is made.
        del tensor


def _write_record(
    staging: Path,
    source: str,
    family: Family,
    direction: str,
    certificate: Certificate,
    config: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> None:
    record = {
        "source": source,
        "direction": direction,
        "family": family.model_type,
        "model_type": config["model_type"],
        "rules": [str(rule) for rule in family.rules],
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "certificate": certificate.to_dict(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
    }
    write_json(staging / CONVERSION_FILE, record)


def _versions() -> dict[str, str]:
    versions = {"lme-convert": lme_convert.__version__, "python": platform.python_version()}
    for package in ("torch", "safetensors", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions

"""What of this system can be used on this machine."""

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_OURS = ("lme-cli", "lme-core", "lme-kernels", "lme-parallel", "lme-data", "lme-convert")
_OPTIONAL = {
    "transformers": ("lme-convert", "hf", "certificates, tokenizers by name"),
    "datasets": ("lme-data", "hf", "datasets by name"),
    "huggingface_hub": ("lme-convert", "hf", "models by name"),
    "jax": ("lme-kernels", "jax", "Pallas kernels"),
    "wandb": ("lme-cli", "wandb", "the wandb tracker"),
    "aim": ("lme-cli", "aim", "the aim tracker"),
    "torch_xla": ("lme-parallel", "tpu", "TPUs"),
}
_SMALL_SHARED_MEMORY = 64 * 2**20
_FEW_FILES = 1024


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    is_usable: bool
    detail: str
    """What was found; where it is not usable, why and what to do."""


def findings() -> list[Finding]:
    """Look at everything; nothing is changed and no network is used."""
    return [*_packages(), *_devices(), *_backends(), *_optional(), *_machine()]


def _packages() -> Iterator[Finding]:
    yield Finding("python", True, platform.python_version())
    for name in (*_OURS, "torch"):
        found = _version(name)
        yield Finding(name, found is not None, found or "not installed")


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("CPU", True, f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            detail = f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
            yield Finding(f"CUDA {index}", True, detail)
    else:
        yield Finding("CUDA", False, _why_no_cuda())
    mps = torch.backends.mps
    if mps.is_available():
        yield Finding("MPS", True, "Apple GPU")
    else:
        yield Finding("MPS", False, "no Apple GPU" if mps.is_built() else "torch without MPS")


def _why_no_cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "this torch was built without CUDA; install lme-cli with its `cuda` extra"
    if not Path("/proc/driver/nvidia").exists():
        return f"torch has CUDA {torch.version.cuda}, but no NVIDIA driver is loaded"
    return f"torch has CUDA {torch.version.cuda}, but sees no device (CUDA_VISIBLE_DEVICES?)"


def _backends() -> Iterator[Finding]:
    from lme_kernels import device
    from lme_kernels.op import Backend

    kinds = device.types_here()
    for backend in Backend:
        reasons = {kind: device.why_unavailable(backend, kind) for kind in kinds}
        usable = [kind for kind, reason in reasons.items() if reason is None]
        why = "; ".join(dict.fromkeys(reason for reason in reasons.values() if reason))
        detail = f"on {', '.join(usable)}" if usable else why
        yield Finding(f"kernels: {backend}", bool(usable), detail)


def _optional() -> Iterator[Finding]:
    for module, (package, extra, purpose) in _OPTIONAL.items():
        if importlib.util.find_spec(module) is not None:
            yield Finding(module, True, f"{_version(module) or 'found'} ({purpose})")
        else:
            detail = f"not installed; for {purpose}: `pip install '{package}[{extra}]'`"
            yield Finding(module, False, detail)


def _machine() -> Iterator[Finding]:
    compiler = next((each for each in ("c++", "g++", "clang++") if shutil.which(each)), None)
    detail = compiler or "none found; `torch_compile: true` needs one on a CPU"
    yield Finding("C++ compiler", compiler is not None, detail)
    free = shutil.disk_usage(".").free
    yield Finding("disk", True, f"{free / 2**30:.0f} GiB free here")
    shared = Path("/dev/shm")
    if shared.exists():
        size = shutil.disk_usage(shared).total
        small = size < _SMALL_SHARED_MEMORY
        advice = "; containers: start with a larger --shm-size" if small else ""
        yield Finding("shared memory", not small, f"{size / 2**20:.0f} MiB{advice}")
    yield from _file_limit()


def _file_limit() -> Iterator[Finding]:
    if importlib.util.find_spec("resource") is None:
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = limit < _FEW_FILES
    advice = f"; raise it with `ulimit -n {_FEW_FILES}`" if few else ""
    yield Finding("open files", not few, f"at most {limit}{advice}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

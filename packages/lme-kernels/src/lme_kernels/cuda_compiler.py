"""CUDA C++ compiled at first use by NVRTC, the compiler that torch brings, and kept on disk."""

import ctypes
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

HEADERS = ("cuda_elements.cuh",)
DIGEST_BYTES = 32


class CudaCompileError(RuntimeError):
    """NVRTC is absent, or refused a source; the message has its log."""


class Nvrtc:
    """The NVRTC library and the calls of it that compiling takes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Keep the loaded library; nothing of it is called yet."""
        self._library = library

    def version(self) -> str:
        """Version of the compiler: "13.2"."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def architectures(self) -> list[int]:
        """Compute capabilities that it compiles for, ascending: 90 is 9.0."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return sorted(found)

    def compile(
        self, name: str, source: str, headers: Sequence[tuple[str, str]], options: Sequence[str]
    ) -> bytes:
        """Compile one source.

        Args:
            name: What messages call it.
            source: CUDA C++.
            headers: Names and texts of what it includes.
            options: Options of the compiler, with `--gpu-architecture` among them.

        Returns:
            A cubin for `sm_90` and the like, PTX with a zero after it for `compute_90`.

        Raises:
            CudaCompileError: If it does not compile; with the compiler's log.
        """
        program = ctypes.c_void_p()
        names, texts = (_strings([each[index] for each in headers]) for index in (0, 1))
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            source.encode(),
            name.encode(),
            len(headers),
            texts,
            names,
        )
        try:
            status = self._library.nvrtcCompileProgram(program, len(options), _strings(options))
            if status != 0:
                log = self._read(program, "nvrtcGetProgramLog").rstrip(b"\0").decode()
                raise CudaCompileError(
                    f"NVRTC {self.version()} could not compile `{name}` with "
                    f"{' '.join(options)} ({self._explain(status)}):\n{log}"
                )
            real = any("=sm_" in each for each in options)
            return self._read(program, "nvrtcGetCUBIN" if real else "nvrtcGetPTX")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, function: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{function}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(function, program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = self._library[function](*arguments)
        if status != 0:
            raise CudaCompileError(f"`{function}` failed: {self._explain(status)}")

    def _explain(self, status: int) -> str:
        function = self._library.nvrtcGetErrorString
        function.restype = ctypes.c_char_p
        return f"{function(status).decode()}, {status}"


def why_no_nvrtc() -> str | None:
    """Say why NVRTC cannot be loaded; `None` if it can."""
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    try:
        nvrtc()
    except CudaCompileError as error:
        return str(error)
    return None


@cache
def nvrtc() -> Nvrtc:
    """Load NVRTC of the CUDA version that torch is built for.

    Raises:
        CudaCompileError: If it is not found; with where it was looked for.
    """
    tried = []
    for path in _candidates():
        try:
            return Nvrtc(_load(path))
        except OSError as error:
            tried.append(f"{path} ({error})")
    raise CudaCompileError(
        f"NVRTC of CUDA {torch.version.cuda} was not found; tried {', '.join(tried) or 'nothing'}. "
        "It comes with the CUDA build of torch (package `nvidia-cuda-nvrtc`)"
    )


def _load(path: str) -> ctypes.CDLL:
    # NVRTC opens its builtins by name when it compiles. That of some wheels (13.0) does not look
    # beside itself; a library of that name which is loaded already serves.
    for builtins in (
        sorted(Path(path).parent.glob("libnvrtc-builtins*.so.*")) if "/" in path else ()
    ):
        if ".alt." not in builtins.name:
            ctypes.CDLL(str(builtins))
    return ctypes.CDLL(path)


def _candidates() -> Iterator[str]:
    """Paths of NVRTC: of the wheels that torch depends on, in torch, where the loader looks."""
    major = (torch.version.cuda or "").split(".")[0]
    name = f"libnvrtc.so.{major}"
    nvidia = find_spec("nvidia")
    for root in (nvidia.submodule_search_locations or ()) if nvidia else ():
        for folder in (f"cu{major}", "cuda_nvrtc"):
            path = Path(root, folder, "lib", name)
            if path.exists():
                yield str(path)
    yield from map(
        str, sorted(Path(torch.__file__).parent.glob(f"lib/libnvrtc-????????.so.{major}*"))
    )
    yield name
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    yield str(Path(home, "lib64", name))


def options_for(capability: int, defines: Sequence[str], supported: Sequence[int]) -> list[str]:
    """Options to compile for a device.

    Args:
        capability: Compute capability of the device: 90 is 9.0.
        defines: Macros, as `NAME=value`.
        supported: Capabilities that the compiler knows, ascending.

    Returns:
        The options. A device newer than the compiler gets PTX, which its driver compiles.

    Raises:
        CudaCompileError: If the device is older than all that the compiler knows.
    """
    older = [each for each in supported if each <= capability]
    if not older:
        raise CudaCompileError(
            f"NVRTC compiles for compute capability {supported[0] / 10} at least, and this device "
            f'has {capability / 10}; take `backend="torch"`'
        )
    kind = "sm" if older[-1] == capability else "compute"
    return [
        f"--gpu-architecture={kind}_{older[-1]}",
        "--std=c++17",
        *(f"--define-macro={each}" for each in defines),
    ]


def compile_file(file: str, defines: Sequence[str], capability: int) -> bytes:
    """Compile a `.cu` file of this package for a device, or read what was compiled before.

    Args:
        file: Path below the package: "ops/swiglu/_cuda.cu".
        defines: Macros, as `NAME=value`.
        capability: Compute capability of the device: 90 is 9.0.

    Returns:
        What the driver loads: a cubin, or PTX.

    Raises:
        CudaCompileError: If NVRTC is absent or refuses the source.
    """
    compiler = nvrtc()
    package = files("lme_kernels")
    source = package.joinpath(file).read_text()
    headers = [(each, package.joinpath(each).read_text()) for each in HEADERS]
    options = options_for(capability, defines, compiler.architectures())
    parts = [compiler.version(), *options, source, *(text for _, text in headers)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    path = cache_folder() / key[:2] / key
    image = _read(path)
    if image is None:
        image = compiler.compile(file, source, headers, options)
        logger.info("kernels compiled: file=%s options=%s", file, " ".join(options))
        _write(path, image)
    return image


def cache_folder() -> Path:
    """Folder of compiled kernels: below `XDG_CACHE_HOME`, or `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lme_kernels" / "nvrtc"


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, image = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    # A damaged file is compiled again: the driver would load some of them.
    return image if hashlib.sha256(image).digest() == digest else None


def _write(path: Path, image: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: of several processes each writes its own, and readers see a whole one.
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(image).digest() + image)
            Path(temporary).replace(path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        # A read-only home costs a compilation each process, and no run.
        logger.info("kernels not kept: path=%s error=%s", path, error)


def _strings(values: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(values))(*(each.encode() for each in values))

"""CUDA C++ compiles for GPUs that need not be here, once, and says what is wrong if not."""

import re
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch

from lme_kernels import cuda_compiler, device
from lme_kernels._cuda_packing import OFFSETS, UNITS
from lme_kernels._cuda_rows import ELEMENTS
from lme_kernels.cuda_compiler import (
    CudaCompileError,
    compile_file,
    nvrtc,
    options_for,
    why_no_nvrtc,
)
from lme_kernels.ops.continuous_count._cuda import INTEGERS

NO_NVRTC = why_no_nvrtc()
needs_nvrtc = pytest.mark.skipif(NO_NVRTC is not None, reason=f"needs NVRTC: {NO_NVRTC}")

SWIGLU = [(f"ELEMENT={each}",) for each in ELEMENTS.values()]
COUNT = [(f"INTEGER={each}",) for each in INTEGERS.values()]
# Every macro that a launch gives, and the kernels that it looks for.
SOURCES = {
    "ops/swiglu/_cuda.cu": (
        SWIGLU,
        {
            f"swiglu_{way}_{how}"
            for way in ("forward", "backward")
            for how in ("vectors", "elements")
        },
    ),
    "ops/swiglu_packed/_cuda.cu": (
        SWIGLU,
        {
            f"swiglu_packed_{way}_{how}"
            for way in ("forward", "backward")
            for how in ("vectors", "elements")
        },
    ),
    "ops/pack_sequence/_cuda.cu": (
        [(f"UNIT={u}", f"OFFSET={o}") for u in UNITS.values() for o in OFFSETS.values()],
        {f"{way}_{how}" for way in ("pack", "unpack") for how in ("wide", "narrow")},
    ),
    "ops/continuous_count/_cuda.cu": (COUNT, {"count_shared", "count_global"}),
    "ops/sort_by_expert/_cuda.cu": (
        COUNT,
        {f"{what}_{where}" for what in ("count", "place") for where in ("shared", "global")},
    ),
}


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_every_source_is_compiled_here():
    package = files("lme_kernels")
    found = {
        f"ops/{each.name}/_cuda.cu"
        for each in package.joinpath("ops").iterdir()
        if each.joinpath("_cuda.cu").is_file()
    }
    assert found == set(SOURCES)


@needs_nvrtc
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("file", SOURCES)
def test_every_kernel_compiles(file, capability):
    variants, kernels = SOURCES[file]
    for defines in variants if capability == 90 else variants[-1:]:
        image = compile_file(file, defines, capability)
        assert image[:4] == b"\x7fELF"
        assert set(re.findall(rb"\.text\.(\w+)", image)) == {each.encode() for each in kernels}


@needs_nvrtc
def test_no_floating_point_is_added_atomically():
    for file, (variants, _) in SOURCES.items():
        options = ["--gpu-architecture=compute_90", *(f"--define-macro={x}" for x in variants[0])]
        source = files("lme_kernels").joinpath(file).read_text()
        header = files("lme_kernels").joinpath("cuda_elements.cuh").read_text()
        ptx = nvrtc().compile(file, source, [("cuda_elements.cuh", header)], options).decode()
        assert not re.search(r"(atom|red)\.[\w.]*\.f\d", ptx)


@needs_nvrtc
def test_what_was_compiled_is_read_from_the_disk(monkeypatch, tmp_path):
    arguments = ("ops/continuous_count/_cuda.cu", COUNT[0], 90)
    image = compile_file(*arguments)
    (path,) = [each for each in tmp_path.rglob("*") if each.is_file()]

    calls = []
    compile_again = cuda_compiler.Nvrtc.compile
    monkeypatch.setattr(
        cuda_compiler.Nvrtc, "compile", lambda *args: calls.append(1) or compile_again(*args)
    )
    assert compile_file(*arguments) == image
    assert not calls
    # One bit of it damaged, and cut short.
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:10], b""):
        path.write_bytes(damaged)
        assert compile_file(*arguments) == image
        assert path.read_bytes() == whole
    assert len(calls) == 3
    # Other macros, another GPU: other files.
    compile_file(arguments[0], COUNT[1], 90)
    compile_file(arguments[0], COUNT[0], 80)
    assert len([each for each in tmp_path.rglob("*") if each.is_file()]) == 3


@needs_nvrtc
def test_a_folder_that_cannot_be_written_costs_only_time(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert compile_file("ops/continuous_count/_cuda.cu", COUNT[0], 90)[:4] == b"\x7fELF"


@needs_nvrtc
def test_the_log_of_the_compiler_is_in_the_error():
    source = "__global__ void broken() { nonsense; }"
    with pytest.raises(CudaCompileError) as caught:
        nvrtc().compile("broken.cu", source, [], ["--gpu-architecture=sm_90"])
    assert "broken.cu(1)" in str(caught.value)
    assert 'identifier "nonsense" is undefined' in str(caught.value)


@needs_nvrtc
def test_a_gpu_newer_than_the_compiler_gets_ptx():
    newest = nvrtc().architectures()[-1]
    image = compile_file("ops/continuous_count/_cuda.cu", COUNT[0], newest + 1)
    assert f".target sm_{newest}".encode() in image
    assert image.endswith(b"\0")


def test_builtins_beside_the_compiler_are_loaded_before_it(tmp_path, monkeypatch):
    # The wheel of NVRTC 13.0 does not find them by itself.
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    names = ("libnvrtc-builtins.so.13.0", "libnvrtc-builtins.alt.so.13.0", "libnvrtc.so.13")
    for name in names:
        (folder / name).touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(cuda_compiler, "find_spec", lambda name: spec)
    loaded = []
    monkeypatch.setattr(cuda_compiler.ctypes, "CDLL", loaded.append)
    nvrtc.cache_clear()
    try:
        nvrtc()
    finally:
        nvrtc.cache_clear()
    assert loaded == [str(folder / names[0]), str(folder / names[2])]


def test_options_name_the_gpu():
    supported = [75, 80, 90, 100]
    assert options_for(90, ("A=b",), supported) == [
        "--gpu-architecture=sm_90",
        "--std=c++17",
        "--define-macro=A=b",
    ]
    assert options_for(121, (), supported)[0] == "--gpu-architecture=compute_100"
    with pytest.raises(CudaCompileError, match=r"7\.5 at least, and this device has 7\.0"):
        options_for(70, (), supported)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert device.why_unavailable("cuda", "cuda") == "this torch is not built for CUDA"

    monkeypatch.setattr(torch.version, "cuda", "99.1")
    nvrtc.cache_clear()
    try:
        reason = device.why_unavailable("cuda", "cuda")
    finally:
        nvrtc.cache_clear()
    assert reason is not None
    assert reason.startswith("NVRTC of CUDA 99.1 was not found; tried ")
    assert "libnvrtc.so.99" in reason
    # Where tensors are decides first: nothing is loaded for those of a CPU.
    assert device.why_unavailable("cuda", "cpu") == (
        "it runs on cuda tensors, and these are on cpu"
    )

"""The CUDA C++ kernels as they are launched, run on a CPU: compiled by g++ with an emulator."""

import ctypes
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from lme_kernels import _cuda_rows, cuda_driver, device
from lme_kernels.examples import Example, examples_of
from lme_kernels.functional import ALL_OPS
from lme_kernels.op import Backend
from lme_kernels.testing import check_against_reference, run

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs g++ on the path, found none"
)

OPS = [op for op in ALL_OPS.values() if Backend.CUDA in op.implementations]
# What only PTX can say, and the same for the emulator.
REPLACED = {
    r"reinterpret_cast<(const type|type)\*>": r"aligned<\1>",
    r'asm\("cvt\.f32\.f16 .*?\);': "y = float_of_half(x.bits);",
    r'asm\("cvt\.rn\.f16\.f32 .*?\);': "y.bits = half_of_float(x);",
    r'asm\("cvt\.rn\.bf16\.f32 .*?\);': "",
    r'asm volatile\("st\.global.*?\);': "*to = raw;",
    r"extern __shared__ int shared\[\];": "",
    r'#include "cuda_elements\.cuh"': "",
}


def translate(text):
    for pattern, replacement in REPLACED.items():
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return text


def kernels_of(source):
    """Names of the kernels that a `.cu` file defines, by macros or not."""
    plain = re.findall(r'extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\(', source)
    macros = re.findall(r"^(?:FORWARD|BACKWARD)\((\w+),", source, flags=re.MULTILINE)
    return [name for name in plain if name != "NAME"] + macros


class EmulatedDriver:
    """Launches on the CPU what `Kernel` asks the driver to launch."""

    def __init__(self, folder):
        self.folder = folder
        self.launched = set()
        self.libraries = {}

    def module(self, file, defines, index):
        if (file, defines) not in self.libraries:
            package = files("lme_kernels")
            source = package.joinpath(file).read_text()
            name = self.folder / f"module{len(self.libraries)}"
            emulator = Path(__file__).with_name("cuda_emulator.hpp")
            branches = "".join(
                f'if (!strcmp(name, "{each}")) return launch([](void** p) {{ call_with({each}, p); }}, '
                "parameters, grid, x, y, bytes);\n"
                for each in kernels_of(source)
            )
            text = "\n".join(
                [
                    emulator.read_text(),
                    translate(package.joinpath("cuda_elements.cuh").read_text()),
                    translate(source),
                    'extern "C" int emulate(const char* name, void** parameters, unsigned grid, '
                    f"unsigned x, unsigned y, int bytes) {{\n{branches}return 3;\n}}",
                ]
            )
            name.with_suffix(".cpp").write_text(text)
            subprocess.run(
                [
                    "g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing",
                    "-D__CUDA_ARCH__=750", *(f"-D{each}" for each in defines),
                    str(name.with_suffix(".cpp")), "-o", str(name.with_suffix(".so")),
                ],
                check=True,
            )  # fmt: skip
            self.libraries[file, defines] = ctypes.CDLL(str(name.with_suffix(".so")))
        return self.libraries[file, defines]

    def function(self, module, name):
        return module, name

    def launch(self, function, grid, _, __, x, y, z, shared_bytes, stream, parameters, extra):
        library, name = function
        self.launched.add(name)
        status = library.emulate(name.encode(), parameters, grid, x, y, shared_bytes)
        assert status == 0, f"{name}: {status}"
        return 0


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    driver = EmulatedDriver(tmp_path_factory.mktemp("emulated"))
    patch = pytest.MonkeyPatch()
    patch.setattr(cuda_driver, "driver", lambda: driver)
    patch.setattr(cuda_driver, "_module", driver.module)
    patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    patch.setitem(device.SERVED_DEVICES, "cuda", frozenset({"cuda", "cpu"}))
    patch.setattr(device, "why_unusable", lambda: None)
    for op in OPS:
        op._tables.clear()
    yield driver
    patch.undo()
    cuda_driver.kernel.cache_clear()
    _cuda_rows._plan.cache_clear()
    for op in OPS:
        op._tables.clear()


def shifted(x):
    """`x` at an address that only the size of an element divides."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x)


def more_examples(op):
    """What the examples leave out: sizes and addresses that decide which kernel runs."""
    normal = torch.randn
    if op.name == "swiglu":
        wide = normal(3, 4 * 515)
        return [
            Example("a part of a block and an odd end", (normal(9001), normal(9001))),
            Example("rows of vectors apart", (wide[:, :1024], wide[:, 1024:2048])),
            Example("no dimension", (normal(()), normal(()))),
            Example("transposed", (normal(7, 9).T, normal(9, 7))),
        ]
    if op.name == "swiglu_packed":
        return [
            Example("rows apart", (normal(5, 2 * width)[:, :width],), {"layout": layout})
            for layout in ("interleaved", "concatenated")
            for width in (64, 66)
        ] + [Example("one row", (normal(2 * 4099),))]
    if op.name == "pack_sequence":
        lengths = torch.randint(0, 4, (2100,))
        many = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        total = int(many[-1]) + 3
        return [
            Example("many sequences, wide", (normal(2100, 3, 36), many), {"total_tokens": total}),
            Example("many sequences, narrow", (normal(2100, 3), many), {"total_tokens": total}),
            Example(
                "longer than rows",
                (normal(2, 3, 4), torch.tensor([0, 5, 7], dtype=torch.int32)),
                {"total_tokens": 7, "padding_side": "right"},
            ),
        ]
    if op.name == "unpack_sequence":
        offsets = torch.tensor([0, 5, 5, 9])
        options = {"batch_size": 3, "max_seqlen": 4, "pad_value": -1.5}
        return [
            Example("longer than rows, a pad", (normal(9, 64), offsets), options),
            Example("longer than rows, a pad right", (normal(9, 3), offsets),
                    {**options, "padding_side": "right"}),
        ]  # fmt: skip
    values = torch.randint(-2, 300, (9001,))
    if op.name == "continuous_count":
        return [
            Example("many blocks", (values, 290)),
            Example("int32, an odd address", (shifted(values.int()), 290)),
            Example("bins beyond shared memory", (values * 100, 20001)),
        ]
    return [
        Example("many blocks", (values, 299)),
        Example("int32, an odd address", (shifted(values.int()), 3)),
        Example("experts beyond shared memory", (values * 5, 1300)),
        Example("more than a block", (torch.randint(0, 8, (40000,)), 8)),
    ]


CALLS = [
    pytest.param(op, example, id=f"{op.name}-{example.name}")
    for op in OPS
    for example in [*examples_of(op), *more_examples(op)]
]


@pytest.mark.parametrize(("op", "example"), CALLS)
def test_values_and_gradients_match_float64(emulated, op, example):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_against_reference(
            op.function,
            example.arguments,
            example.options,
            backend="cuda",
            dtype=dtype,
            where="cpu",
            constants=example.constants,
        )
        if not any(each.is_floating_point() for each in example.arguments[:1]):
            break


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_an_odd_address_changes_nothing(emulated, op):
    example = examples_of(op)[0]
    first, *others = example.arguments
    aligned = op.function(first, *others, **example.options, backend="cuda")
    odd = op.function(shifted(first), *others, **example.options, backend="cuda")
    pairs = zip(
        *(each if isinstance(each, tuple) else (each,) for each in (aligned, odd)), strict=True
    )
    for one, other in pairs:
        assert torch.equal(one, other)


@pytest.mark.parametrize("room", [8, 3])
@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
def test_wide_rows_start_at_any_element(emulated, layout, room):
    # Wide enough that every thread has all its elements within a row.
    x = torch.randn(3, 2 * 2048 + room)[:, : 2 * 2048]
    check_against_reference(
        ALL_OPS["swiglu_packed"].function,
        (x,),
        {"layout": layout},
        backend="cuda",
        dtype=torch.float16,
        where="cpu",
    )


@pytest.mark.parametrize("name", ["swiglu", "swiglu_packed"])
def test_float64_is_computed_in_float64(emulated, name):
    op = ALL_OPS[name]
    for example in examples_of(op):
        check_against_reference(
            op.function,
            example.arguments,
            example.options,
            backend="cuda",
            dtype=torch.float64,
            where="cpu",
        )


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int64, torch.int16, torch.bool, torch.uint8]
)
@pytest.mark.parametrize("width", [1, 3, 40])
def test_any_dtype_is_packed_and_unpacked(emulated, dtype, width):
    pack, unpack = ALL_OPS["pack_sequence"].function, ALL_OPS["unpack_sequence"].function
    x = (torch.randn(4, 5, width) * 9).to(dtype)
    offsets = torch.tensor([0, 5, 5, 6, 9], dtype=torch.int32)
    options = {"batch_size": 4, "max_seqlen": 5, "pad_value": 1}
    ours, theirs = (pack(x, offsets, total_tokens=9, backend=each) for each in ("cuda", "torch"))
    assert torch.equal(ours, theirs)
    ours, theirs = (unpack(theirs, offsets, **options, backend=each) for each in ("cuda", "torch"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_compiled_code_gives_the_same(emulated, op):
    torch._dynamo.reset()
    op.load("cpu")
    example = examples_of(op)[0]
    compiled = torch.compile(op.function, fullgraph=True, dynamic=True, backend="aot_eager")
    options = {**example.options, "backend": "cuda"}
    ours = run(compiled, example.arguments, options)
    theirs = run(op.function, example.arguments, options)
    assert len(ours.outputs) == len(theirs.outputs)
    assert len(ours.gradients) == len(theirs.gradients)
    pairs = zip((*ours.outputs, *ours.gradients), (*theirs.outputs, *theirs.gradients), strict=True)
    for one, other in pairs:
        assert torch.equal(one, other)


def test_custom_ops_keep_the_contract_of_torch(emulated):
    offsets = torch.tensor([0, 3, 5], dtype=torch.int32)
    indices = torch.randint(0, 7, (40,))
    x, y = torch.randn(5, 12), torch.randn(5, 6)
    calls = {
        "swiglu_cuda_forward": (y, y),
        "swiglu_cuda_backward": (y, y, y),
        "swiglu_packed_cuda_forward": (x, "interleaved"),
        "swiglu_packed_cuda_backward": (y, x, "concatenated"),
        "pack_sequence_cuda_forward": (torch.randn(2, 3, 4), offsets, 5, True),
        "unpack_sequence_cuda_forward": (x, offsets, 3, False, 0),
        "continuous_count_cuda_forward": (indices, 7),
        "sort_by_expert_cuda_forward": (indices, 7),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(
            getattr(torch.ops.lme_kernels, name).default,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_every_kernel_was_launched(emulated):
    defined = {
        name
        for path in files("lme_kernels").joinpath("ops").iterdir()
        if path.joinpath("_cuda.cu").is_file()
        for name in kernels_of(path.joinpath("_cuda.cu").read_text())
    }
    assert emulated.launched == defined

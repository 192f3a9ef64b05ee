"""What the driver is asked for a launch, told to a driver that only takes notes."""

import ctypes
import struct
from types import SimpleNamespace

import pytest
import torch

from lme_kernels import cuda_driver
from lme_kernels.cuda_driver import CudaDriverError, Driver, Kernel

DEVICE = 3


class Notes:
    """Stands for the library: notes each call, and answers what it is told to."""

    def __init__(self):
        self.calls = []
        self.answers = {}

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def function(*arguments):
            self.calls.append((name, arguments))
            if name in ("cuGetErrorName", "cuGetErrorString"):
                _, text = arguments
                words = {"cuGetErrorName": b"CUDA_ERROR_X", "cuGetErrorString": b"it went wrong"}
                ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = words[name]
                return 0
            answers = self.answers.get(name, [])
            return answers.pop(0) if answers else 0

        vars(self)[name] = function
        return function

    def names(self):
        return [name for name, _ in self.calls]


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: 7000 + i, raising=False)
    return Notes()


def parameters_at(address, letters):
    """Values that the driver would read: an address of each parameter."""
    addresses = ctypes.cast(address, ctypes.POINTER(ctypes.c_void_p))
    return [
        struct.unpack(letter, ctypes.string_at(addresses[index], struct.calcsize(letter)))[0]
        for index, letter in enumerate(letters)
    ]


def test_parameters_lie_where_the_driver_reads_them(library):
    # Narrow ones before wide ones, so that alignment leaves gaps.
    letters = "PiqIdfQi"
    values = (2**63 + 5, -7, -(2**40), 2**32 - 1, 0.1, 0.5, 2**64 - 1, 9)
    read = []
    driver = Driver(library)

    def launch(*arguments):
        read.append((arguments, parameters_at(ctypes.addressof(arguments[9]), letters)))
        return 0

    driver.launch = launch
    Kernel(driver, ctypes.c_void_p(11), "name", letters, DEVICE)(
        5, (32, 8), *values, shared_bytes=64
    )
    ((arguments, seen),) = read
    assert arguments[0].value == 11
    assert arguments[1:8] == (5, 1, 1, 32, 8, 1, 64)
    assert arguments[8].value == 7000 + DEVICE
    assert arguments[10] is None
    assert seen == list(values)


def test_a_thread_without_a_context_gets_that_of_the_device(library):
    driver = Driver(library)
    library.answers["cuLaunchKernel"] = [cuda_driver.INVALID_CONTEXT, 0]
    Kernel(driver, ctypes.c_void_p(1), "name", "i", DEVICE)(1, (1, 1), 4)
    assert library.names() == [
        "cuLaunchKernel",
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuCtxSetCurrent",
        "cuLaunchKernel",
    ]
    assert library.calls[1][1][1] == DEVICE


def test_a_refused_launch_says_what_and_why(library):
    driver = Driver(library)
    library.answers["cuLaunchKernel"] = [701]
    with pytest.raises(CudaDriverError) as caught:
        Kernel(driver, ctypes.c_void_p(1), "name", "i", DEVICE)(2, (64, 4), 4, shared_bytes=128)
    assert str(caught.value) == (
        "launching `name` with 2 blocks of 64 x 4 threads and 128 bytes of shared memory failed: "
        "CUDA_ERROR_X (it went wrong)"
    )


def test_a_value_that_does_not_fit_its_parameter_is_no_launch(library):
    kernel = Kernel(Driver(library), ctypes.c_void_p(1), "name", "i", DEVICE)
    with pytest.raises(struct.error):
        kernel(1, (1, 1), 2**31)
    assert library.calls == []


@pytest.mark.parametrize("status", [0, 209])
def test_loading_is_allowed_while_a_graph_is_captured(library, status):
    driver = Driver(library)
    library.answers["cuModuleLoadData"] = [status]
    if status == 0:
        driver.load(b"image", DEVICE)
    else:
        with pytest.raises(CudaDriverError, match="loading compiled kernels failed"):
            driver.load(b"image", DEVICE)
    names = library.names()
    start = names.index("cuThreadExchangeStreamCaptureMode")
    # Before and after, also where it fails: the mode is put back.
    assert names[start : start + 3] == [
        "cuThreadExchangeStreamCaptureMode",
        "cuModuleLoadData",
        "cuThreadExchangeStreamCaptureMode",
    ]
    assert library.calls[start + 1][1][1] == b"image"


def test_a_kernel_is_compiled_and_loaded_once_a_device_and_macros(library, monkeypatch):
    compiled = []
    driver = Driver(library)
    monkeypatch.setattr(cuda_driver, "driver", lambda: driver)
    monkeypatch.setattr(cuda_driver, "compile_file", lambda *args: compiled.append(args) or b"")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    # Numbers that no device has: the cache is that of the process.
    for index, define in ((1001, "A=1"), (1001, "A=1"), (1002, "A=1"), (1001, "A=2")):
        for name in ("one", "two"):
            cuda_driver.kernel("file.cu", name, "i", (define,), index)
    assert compiled == [
        ("file.cu", ("A=1",), 90 + 1001),
        ("file.cu", ("A=1",), 90 + 1002),
        ("file.cu", ("A=2",), 90 + 1001),
    ]
    assert library.names().count("cuModuleLoadData") == 3
    assert library.names().count("cuModuleGetFunction") == 6


def test_without_a_driver_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(cuda_driver, "why_no_nvrtc", lambda: None)

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda_driver, "ctypes", SimpleNamespace(CDLL=missing))
    cuda_driver.driver.cache_clear()
    try:
        assert cuda_driver.why_unusable() == (
            "there is no CUDA driver: libcuda.so.1: cannot open shared object file"
        )
    finally:
        cuda_driver.driver.cache_clear()

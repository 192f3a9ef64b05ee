"""Kernels of compiled CUDA C++, loaded and launched through the driver API."""

import ctypes
import struct
from functools import cache
from typing import Any

import torch

from lme_kernels.cuda_compiler import compile_file, why_no_nvrtc

INVALID_CONTEXT = 201
CAPTURE_RELAXED = 2


class CudaDriverError(RuntimeError):
    """A call of the CUDA driver failed."""


class Driver:
    """The driver library and the calls of it that loading and launching take."""

    def __init__(self, library: Any) -> None:
        """Keep the loaded library, a `ctypes.CDLL` or what stands for it in a test."""
        self._library = library
        # Without `argtypes`, whose conversions take longer than the launch: pointers are given as
        # objects of ctypes, numbers have 32 bits.
        self.launch = library.cuLaunchKernel

    def check(self, status: int, what: str) -> None:
        """Raise if a call failed.

        Args:
            status: What the call returned.
            what: What it was for, for the message.

        Raises:
            CudaDriverError: If it is no success; with the driver's name of it and its words.
        """
        if status == 0:
            return
        texts = []
        for function in (self._library.cuGetErrorName, self._library.cuGetErrorString):
            text = ctypes.c_char_p()
            function(status, ctypes.byref(text))
            texts.append(text.value.decode() if text.value else f"error {status}")
        raise CudaDriverError(f"{what} failed: {texts[0]} ({texts[1]})")

    def bind_context(self, device: int) -> None:
        """Make the primary context of a device, which torch made, current in this thread."""
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        self.check(self._library.cuDeviceGet(ctypes.byref(handle), device), "finding the device")
        self.check(
            self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle),
            "taking the context of the device",
        )
        self.check(self._library.cuCtxSetCurrent(context), "entering the context of the device")

    def load(self, image: bytes, device: int) -> ctypes.c_void_p:
        """Load a cubin or PTX into the context of a device, even while a graph is captured.

        Args:
            image: What NVRTC gave.
            device: Index of the device, the current one.

        Returns:
            The module; it is never unloaded.

        Raises:
            CudaDriverError: If the driver refuses it.
        """
        self.bind_context(device)
        mode = ctypes.c_int(CAPTURE_RELAXED)
        module = ctypes.c_void_p()
        exchange = self._library.cuThreadExchangeStreamCaptureMode
        self.check(exchange(ctypes.byref(mode)), "allowing to load")
        try:
            status = self._library.cuModuleLoadData(ctypes.byref(module), image)
        finally:
            exchange(ctypes.byref(mode))
        self.check(status, "loading compiled kernels")
        return module

    def function(self, module: ctypes.c_void_p, name: str) -> ctypes.c_void_p:
        """Find a kernel in a module by its name.

        Raises:
            CudaDriverError: If there is none.
        """
        found = ctypes.c_void_p()
        status = self._library.cuModuleGetFunction(ctypes.byref(found), module, name.encode())
        self.check(status, f"finding the kernel `{name}`")
        return found


class Kernel:
    """A kernel on one device; calling it launches it on torch's current stream."""

    __slots__ = ("_buffer", "_device", "_driver", "_function", "_name", "_offsets", "_pack")

    def __init__(
        self, driver: Driver, function: ctypes.c_void_p, name: str, parameters: str, device: int
    ) -> None:
        """Lay out the parameters.

        Args:
            driver: The driver.
            function: The kernel.
            name: Its name, for messages.
            parameters: A letter of `struct` each: "P" a pointer, "q" `long long`, "i" `int`,
                "I" `unsigned`, "Q" `unsigned long long`, "f" `float`, "d" `double`.
            device: Index of the device.
        """
        self._driver, self._function, self._name, self._device = driver, function, name, device
        # One buffer a launch: addresses of the parameters, which the driver reads, then they.
        addresses = "P" * len(parameters)
        self._offsets = tuple(
            struct.calcsize(addresses + parameters[: index + 1]) - struct.calcsize(letter)
            for index, letter in enumerate(parameters)
        )
        layout = struct.Struct(addresses + parameters)
        self._pack = layout.pack_into
        self._buffer = ctypes.c_char * layout.size

    def __call__(
        self,
        grid: int,
        block: tuple[int, int],
        *arguments: float,
        shared_bytes: int = 0,
    ) -> None:
        """Launch the kernel; nothing waits for the device.

        Args:
            grid: Number of blocks.
            block: Threads of a block along x and y.
            arguments: Values of the parameters; pointers as `Tensor.data_ptr()` gives them.
            shared_bytes: Bytes of dynamic shared memory.

        Raises:
            CudaDriverError: If the driver refuses the launch.
        """
        buffer = self._buffer()
        base = ctypes.addressof(buffer)
        self._pack(buffer, 0, *map(base.__add__, self._offsets), *arguments)
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self._device))
        launch = self._driver.launch
        shape = (grid, 1, 1, block[0], block[1], 1, shared_bytes)
        status = launch(self._function, *shape, stream, buffer, None)
        if status == INVALID_CONTEXT:
            # A thread in which the runtime has not done anything yet.
            self._driver.bind_context(self._device)
            status = launch(self._function, *shape, stream, buffer, None)
        if status != 0:
            self._driver.check(
                status,
                f"launching `{self._name}` with {grid} blocks of {block[0]} x {block[1]} threads "
                f"and {shared_bytes} bytes of shared memory",
            )


def why_unusable() -> str | None:
    """Say why CUDA C++ cannot be compiled and launched here; `None` if it can."""
    reason = why_no_nvrtc()
    if reason is not None:
        return reason
    try:
        driver()
    except CudaDriverError as error:
        return str(error)
    return None


@cache
def driver() -> Driver:
    """Load the driver library, which comes with the driver.

    Raises:
        CudaDriverError: If there is none.
    """
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except OSError as error:
        raise CudaDriverError(f"there is no CUDA driver: {error}") from error


@cache
def kernel(file: str, name: str, parameters: str, defines: tuple[str, ...], device: int) -> Kernel:
    """Get a kernel of a `.cu` file of this package; compiled and loaded at the first call.

    Args:
        file: Path below the package: "ops/swiglu/_cuda.cu".
        name: Name of the kernel, declared `extern "C"`.
        parameters: Its parameters, as `Kernel` takes them.
        defines: Macros, as `NAME=value`.
        device: Index of the device, the current one.

    Returns:
        The kernel.

    Raises:
        CudaCompileError: If the file does not compile.
        CudaDriverError: If the driver refuses it.
    """
    function = driver().function(_module(file, defines, device), name)
    return Kernel(driver(), function, name, parameters, device)


@cache
def _module(file: str, defines: tuple[str, ...], device: int) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(device)
    return driver().load(compile_file(file, defines, 10 * major + minor), device)

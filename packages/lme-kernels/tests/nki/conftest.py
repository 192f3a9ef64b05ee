"""An emulator of the few calls of the Neuron Kernel Interface that are used, on CPU tensors.

It is stricter than the hardware where that finds mistakes: what a mask leaves out of a tile is NaN,
an index out of range must be masked, an iteration may not write what another wrote, and tiles have
at most 128 partitions and fit their memory.
"""

import sys
from types import ModuleType

import pytest
import torch

PARTITIONS = 128
PARTITION_BYTES = 192 * 1024


class View:
    """Part of a tensor in device memory, by index tiles."""

    def __init__(self, memory, row, column):
        self.memory = memory
        self.row, self.column = torch.broadcast_tensors(row, column)

    def inside(self, mask):
        mask = torch.ones_like(self.row, dtype=torch.bool) if mask is None else mask
        mask = mask.broadcast_to(self.row.shape)
        M, H = self.memory.shape
        rows, columns = self.row[mask], self.column[mask]
        assert ((rows >= 0) & (rows < M) & (columns >= 0) & (columns < H)).all(), "out of range"
        return mask, rows, columns


class Memory:
    """A tensor in device memory; every element is written at most once."""

    def __init__(self, values, written):
        self.values, self.written = values, written
        self.shape, self.dtype = tuple(values.shape), values.dtype

    def __getitem__(self, index):
        return View(self, *index)


def ndarray(shape, dtype, buffer):
    assert buffer == "shared_hbm"
    values = torch.full(shape, torch.nan, dtype=dtype)
    return Memory(values, torch.zeros(shape, dtype=torch.bool))


def load(view, *, mask=None, dtype=None):
    mask, rows, columns = view.inside(mask)
    tile = torch.full(mask.shape, torch.nan, dtype=dtype or view.memory.dtype)
    check_tile(tile)
    tile[mask] = view.memory.values[rows, columns].to(tile.dtype)
    return tile


def store(view, value, *, mask=None):
    check_tile(value)
    mask, rows, columns = view.inside(mask)
    memory = view.memory
    assert not memory.written[rows, columns].any(), "written twice"
    memory.written[rows, columns] = True
    memory.values[rows, columns] = value[mask].to(memory.dtype)


def check_tile(tile):
    assert tile.ndim == 2
    assert tile.shape[0] <= PARTITIONS
    # A dozen tiles are there at once.
    assert 12 * tile.shape[1] * tile.element_size() <= PARTITION_BYTES


def elementwise(function):
    def apply(*tiles, mask=None, dtype=None):
        for tile in tiles:
            if isinstance(tile, torch.Tensor):
                check_tile(tile)
        result = function(*tiles)
        if mask is not None:
            result = torch.where(mask, result, torch.nan)
        return result.to(dtype) if dtype is not None else result

    return apply


def jit(kernel):
    def run(*tensors):
        for tensor in tensors:
            assert tensor.is_contiguous()
        memories = [Memory(each, torch.ones(each.shape, dtype=torch.bool)) for each in tensors]
        result = kernel(*memories)
        for each in result if isinstance(result, tuple) else (result,):
            assert each.written.all(), "an element was not written"
        return tuple(each.values for each in result) if isinstance(result, tuple) else result.values

    return run


LANGUAGE = {
    "ndarray": ndarray,
    "load": load,
    "store": store,
    "arange": torch.arange,
    "affine_range": range,
    "sigmoid": elementwise(torch.sigmoid),
    "multiply": elementwise(lambda a, b: a * b),
    "add": elementwise(lambda a, b: a + b),
    "subtract": elementwise(lambda a, b: a - b),
    "float32": torch.float32,
    "shared_hbm": "shared_hbm",
}


@pytest.fixture
def emulator(monkeypatch):
    """Stand in for the Neuron compiler and for torch_xla; returns the latter's `runtime`."""
    modules = {
        name: ModuleType(name)
        for name in (
            "neuronxcc",
            "neuronxcc.nki",
            "neuronxcc.nki.language",
            "torch_xla",
            "torch_xla.runtime",
        )
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    modules["neuronxcc.nki"].jit = jit
    vars(modules["neuronxcc.nki.language"]).update(LANGUAGE)
    runtime = modules["torch_xla.runtime"]
    runtime.device_type = lambda: "NEURON"
    name = "lme_kernels.ops.swiglu._nki"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield runtime
    # What was imported with the emulator must not outlive it.
    sys.modules.pop(name, None)

"""The NKI kernels on an emulator; see `conftest.py` for what it checks besides numbers."""

from importlib import import_module

import pytest
import torch

from lme_kernels import device
from lme_kernels.examples import examples_of
from lme_kernels.op import UnsupportedBackendError
from lme_kernels.ops.swiglu import SWIGLU, swiglu
from lme_kernels.testing import check_against_reference

SHAPES = {"past a tile of rows": (131, 40), "past a tile of columns": (3, 2050), "a vector": (7,)}
CALLS = [pytest.param(each.arguments, id=each.name) for each in examples_of(SWIGLU)] + [
    pytest.param((torch.randn(shape), torch.randn(shape)), id=name)
    for name, shape in SHAPES.items()
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arguments", CALLS)
def test_values_and_gradients_match_float64(emulator, arguments, dtype):
    kernels = import_module("lme_kernels.ops.swiglu._nki")

    def call(gate, up, backend):
        return (kernels.swiglu if backend == "nki" else SWIGLU.reference)(gate, up)

    check_against_reference(call, arguments, backend="nki", dtype=dtype, where="cpu")


def test_it_says_what_it_does_not_serve(emulator):
    kernels = import_module("lme_kernels.ops.swiglu._nki")
    assert kernels.why_not(torch.ones(2), torch.ones(2)) is None
    assert "float64 is not among" in kernels.why_not(torch.ones(2).double())
    emulator.device_type = lambda: "TPU"
    assert kernels.why_not(torch.ones(2)).endswith("a device of type TPU")


def test_it_runs_only_when_named_and_only_on_its_device(monkeypatch):
    assert "nki" in SWIGLU.manual
    with pytest.raises(UnsupportedBackendError, match="cannot run on the backend `nki`"):
        swiglu(torch.ones(2), torch.ones(2), backend="nki")
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    assert device.why_unavailable("nki", "xla") == "the package `neuronxcc` is not installed"
    monkeypatch.setattr(device, "find_spec", lambda name: True)
    assert device.why_unavailable("nki", "xla") is None
    assert device.why_unavailable("nki", "cpu") == "it runs on xla tensors, and these are on cpu"

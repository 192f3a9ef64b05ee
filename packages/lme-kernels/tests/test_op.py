import copy

import pytest
import torch

from lme_kernels import device
from lme_kernels.functional import ALL_OPS, rmsnorm, swiglu
from lme_kernels.op import Backend, Op, UnsupportedBackendError
from lme_kernels.ops.rmsnorm import RMSNORM


def double(x):
    return x * 2


def make_op(**options):
    return Op(name="rmsnorm", reference=double, **options)


def test_without_a_name_a_cpu_tensor_takes_the_reference():
    x = torch.randn(3)
    assert RMSNORM.choose(None, x) is RMSNORM.reference
    assert RMSNORM.choose("torch", x) is RMSNORM.reference


def test_a_named_backend_is_taken_by_name_or_member(monkeypatch):
    op = make_op(implementations={Backend.TRITON: "lme_kernels.ops.rmsnorm.reference"})
    monkeypatch.setattr(device, "why_unavailable", lambda backend, device_type: None)
    x = torch.randn(3)
    assert op.choose("triton", x) is op.choose(Backend.TRITON, x) is RMSNORM.reference


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("cuda", "there is no such implementation of `rmsnorm`"),
        ("trition", "there is no such implementation of `rmsnorm`"),
        ("nki", "there is no such implementation of `rmsnorm`"),
    ],
)
def test_a_backend_that_is_not_there_is_refused_with_the_reason(backend, reason):
    with pytest.raises(UnsupportedBackendError) as raised:
        rmsnorm(torch.randn(2, 3), None, backend=backend)
    assert reason in str(raised.value)
    assert "`torch`, `triton`" in str(raised.value)


def test_triton_on_a_cpu_without_its_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    op = Op(name="swiglu", reference=double, implementations={"triton": "nowhere"})
    with pytest.raises(UnsupportedBackendError, match="only under its interpreter"):
        op.choose("triton", torch.randn(3))
    assert op.choose(None, torch.randn(3)) is double


def test_a_call_the_kernel_cannot_take_is_refused_by_name_and_served_otherwise():
    pytest.importorskip("triton")
    x = torch.randn(4, 8, dtype=torch.float64)
    with pytest.raises(UnsupportedBackendError, match="float64 is not among"):
        swiglu(x, x, backend="triton")
    torch.testing.assert_close(swiglu(x, x), torch.nn.functional.silu(x) * x)


def test_automatic_choice_takes_the_first_that_serves(monkeypatch):
    pytest.importorskip("triton")
    op = Op(
        name="rmsnorm",
        reference=double,
        implementations={
            "pallas": "lme_kernels.ops.rmsnorm._triton",
            "cuda": "lme_kernels.ops.rmsnorm.reference",
        },
    )
    monkeypatch.setattr(device, "why_unavailable", lambda backend, device_type: None)
    # The first one's `why_not` refuses float64.
    assert op.choose(None, torch.randn(3), None).__module__.endswith("_triton")
    assert op.choose(None, torch.randn(3).double(), None) is RMSNORM.reference


def test_automatic_choice_passes_over_what_is_not_proven(monkeypatch):
    op = make_op(
        implementations={"cuda": "lme_kernels.ops.rmsnorm.reference"}, manual=frozenset({"cuda"})
    )
    monkeypatch.setattr(device, "why_unavailable", lambda backend, device_type: None)
    assert op.choose(None, torch.randn(3)) is double
    assert op.choose("cuda", torch.randn(3)) is RMSNORM.reference


@pytest.mark.parametrize("name", ALL_OPS)
def test_an_op_is_called_as_its_folder_and_function(name):
    op = ALL_OPS[name]
    assert op.name == name
    assert op.function.__name__ == name
    assert op.function.__module__ == f"lme_kernels.ops.{name}"


def test_a_bound_function_compiles_without_an_import_inside():
    torch._dynamo.reset()
    op = copy.deepcopy(RMSNORM)
    assert op.choose(None, torch.randn(2)) is RMSNORM.reference
    x, weight = torch.randn(3, 8), torch.randn(8)
    compiled = torch.compile(rmsnorm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), rmsnorm(x, weight))


def test_meta_tensors_take_the_reference():
    assert rmsnorm(torch.empty(3, 8, device="meta"), None).shape == (3, 8)

"""What holds for every implementation of every op, proven on the example calls beside each op."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lme_kernels.examples import examples_of
from lme_kernels.functional import ALL_OPS
from lme_kernels.op import UnsupportedBackendError
from lme_kernels.testing import (
    assert_matches,
    check_against_reference,
    device_for,
    dtypes_for,
    fused_backends,
    run,
)

# Under the interpreter, which is slow, further examples of an op run in float32 alone: half precision
# differs in where kernels convert, which the options of an example do not change.
HALF_EXAMPLES = 2


def parameters(only_first):
    for op in ALL_OPS.values():
        for backend in fused_backends(op):
            marks = [pytest.mark.gpu] if device_for(backend).type != "cpu" else []
            for example in examples_of(op)[: 1 if only_first else None]:
                name = f"{op.name}@{backend}-{example.name}"
                yield pytest.param(op, example, backend, id=name, marks=marks)


CALLS = list(parameters(only_first=False))
FIRST_CALLS = list(parameters(only_first=True))


def placed(values, backend, dtype):
    where = device_for(backend)
    return [
        each.to(where, dtype if each.is_floating_point() else each.dtype)
        if isinstance(each, torch.Tensor)
        else each
        for each in values
    ]


def prepared(op, example, backend):
    """Arguments and options in the first dtype that the backend takes; skips if there is none."""
    for dtype in dtypes_for(backend):
        arguments = placed(example.arguments, backend, dtype)
        values = placed(example.options.values(), backend, dtype)
        options = {**dict(zip(example.options, values, strict=True)), "backend": backend}
        if backend == "triton":
            # Takes every dtype; a call to find out is slow under the interpreter.
            return arguments, options
        try:
            op.function(*arguments, **options)
        except UnsupportedBackendError as error:
            reason = str(error)
        else:
            return arguments, options
    pytest.skip(reason)


def call(op, example, backend, function=None):
    """Outputs and gradients of an example call."""
    arguments, options = prepared(op, example, backend)
    result = run(function or op.function, arguments, options, constants=example.constants)
    return [*result.outputs, *result.gradients]


@pytest.mark.parametrize(("op", "example", "backend"), CALLS)
def test_values_and_gradients_match_float64(op, example, backend):
    number = [each.name for each in examples_of(op)].index(example.name)
    refused = []
    dtypes = dtypes_for(backend)
    if backend == "triton" and device_for(backend).type == "cpu" and number >= HALF_EXAMPLES:
        dtypes = dtypes[:1]
    for dtype in dtypes:
        try:
            check_against_reference(
                op.function,
                example.arguments,
                example.options,
                backend=backend,
                dtype=dtype,
                constants=example.constants,
                # Attention's kernels are torch's, in whose backward float32 sums are longer.
                roundings=2.0 if op.name == "attention" else 1.0,
            )
        except UnsupportedBackendError as error:
            refused.append(str(error))
    if len(refused) == len(dtypes):
        pytest.skip(refused[0])


@pytest.mark.parametrize(("op", "example", "backend"), FIRST_CALLS)
def test_compiled_with_dynamic_shapes_it_gives_the_same(op, example, backend):
    torch._dynamo.reset()
    op.load()
    compiled = torch.compile(op.function, fullgraph=True, dynamic=True, backend="aot_eager")
    eager = call(op, example, backend)
    for ours, theirs in zip(call(op, example, backend, compiled), eager, strict=True):
        assert_matches(ours, theirs)


@pytest.mark.parametrize(("op", "example", "backend"), FIRST_CALLS)
def test_it_gives_the_same_bits_twice_and_changes_no_argument(op, example, backend):
    arguments, options = prepared(op, example, backend)
    before = [each.clone() if isinstance(each, torch.Tensor) else each for each in arguments]
    leaves = [
        each.requires_grad_()
        for position, each in enumerate(arguments)
        if isinstance(each, torch.Tensor)
        and each.is_floating_point()
        and position not in example.constants
    ]

    def outputs():
        result = op.function(*arguments, **options)
        return result if isinstance(result, tuple) else (result,)

    once, again = outputs(), outputs()
    # The first graph is used twice: a backward that wrote into a saved tensor would differ. What
    # torch.compile made, as of FlexAttention, is walked once only.
    walks = (once, again) if backend == "flex" else (once, once, again)
    gradients = []
    for graph in walks:
        differentiable = [each for each in graph if each.requires_grad]
        weights = [torch.ones_like(each) for each in differentiable]
        gradients.append(
            torch.autograd.grad(differentiable, leaves, weights, retain_graph=len(walks) == 3)
            if leaves
            else ()
        )
    for ours, theirs in zip(again, once, strict=True):
        assert torch.equal(ours, theirs)
    for other in gradients[1:]:
        for ours, theirs in zip(other, gradients[0], strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(arguments, before, strict=True):
        assert ours is theirs or torch.equal(ours, theirs)


class Recorder(TorchDispatchMode):
    """Keeps the calls of this package's custom ops."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "lme_kernels":
            self.calls.setdefault(function, args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("op", "example", "backend"),
    [each for each in FIRST_CALLS if each.values[2] in ("triton", "cuda")],
)
def test_custom_ops_keep_the_contract_of_torch(op, example, backend, monkeypatch):
    op.load()
    recorder = Recorder()
    # What compiled code would call.
    with monkeypatch.context() as patch, recorder:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        call(op, example, backend)
    assert recorder.calls
    for function, args in recorder.calls.items():
        detached = [each.detach() if isinstance(each, torch.Tensor) else each for each in args]
        torch.library.opcheck(
            function,
            detached,
            # The compiled calls above prove what else there is to check, with dynamic shapes.
            test_utils=("test_schema", "test_faketensor"),
        )

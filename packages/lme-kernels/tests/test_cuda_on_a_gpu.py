"""What only a GPU can prove of the CUDA C++ kernels: sizes of models, graphs, threads, the driver."""

import threading

import pytest
import torch

from lme_kernels import _cuda_rows, cuda_driver
from lme_kernels.functional import (
    continuous_count,
    pack_sequence,
    sort_by_expert,
    swiglu,
    swiglu_packed,
    unpack_sequence,
)
from lme_kernels.packing import cu_seqlens_from_lengths
from lme_kernels.testing import check_against_reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def shifted(x):
    """`x` at an address that only the size of an element divides."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return room[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("H", [1, 768, 4096, 11007, 14336])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_units_of_models_match_float64(H, dtype):
    options = {"backend": "cuda", "dtype": dtype}
    check_against_reference(swiglu, (torch.randn(515, H), torch.randn(515, H)), {}, **options)
    x = torch.randn(515, 2 * H)
    for layout in ("interleaved", "concatenated"):
        check_against_reference(swiglu_packed, (x,), {"layout": layout}, **options)
    # Rows apart, at strides that 16 bytes divide and at others.
    for room in (8, 3):
        wide = torch.randn(515, 2 * H + room)
        check_against_reference(swiglu, (wide[:, :H], wide[:, H : 2 * H]), {}, **options)
        for layout in ("interleaved", "concatenated"):
            check_against_reference(
                swiglu_packed, (wide[:, : 2 * H],), {"layout": layout}, **options
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_and_special_numbers_are_those_of_torch(dtype):
    special = [0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 90.0, -90.0, 1e4, -1e4]
    gate = torch.tensor([*special, float("inf"), float("-inf"), float("nan")], device="cuda").to(
        dtype
    )
    up = torch.full_like(gate, 0.5)
    ours, theirs = (swiglu(gate, up, backend=each) for each in ("cuda", "torch"))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_odd_address_changes_nothing(dtype):
    gate, up, grad = (torch.randn(33, 1024, device="cuda", dtype=dtype) for _ in range(3))

    def results(gate, up, grad):
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        y = swiglu(gate, up, backend="cuda")
        x = gate.detach().requires_grad_()
        packed = swiglu_packed(x, backend="cuda")
        of_x = torch.autograd.grad(packed, x, grad[:, :512])
        return y, packed, *torch.autograd.grad(y, (gate, up), grad), *of_x

    aligned = results(gate, up, grad)
    odd = results(shifted(gate), shifted(up), shifted(grad))
    for one, other in zip(aligned, odd, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (4096, torch.bfloat16),
        (4097, torch.bfloat16),
        (1, torch.int64),
        (5, torch.bool),
        (300, torch.uint8),
        (64, torch.float64),
    ],
    ids=str,
)
def test_sequences_of_models_are_packed_and_unpacked(side, integer, width, dtype):
    B, S = 300, 129
    lengths = torch.randint(0, S + 1, (B,))
    lengths[::7] = 0
    offsets = cu_seqlens_from_lengths(lengths).to(device="cuda", dtype=integer)
    total = int(lengths.sum()) + 5
    x = (torch.randn(B, S, width, device="cuda") * 9).to(dtype)
    ours, theirs = (
        pack_sequence(x, offsets, total_tokens=total, padding_side=side, backend=each)
        for each in ("cuda", "torch")
    )
    assert torch.equal(ours, theirs)
    options = {"batch_size": B, "max_seqlen": S, "padding_side": side, "pad_value": 1}
    ours, again = (
        unpack_sequence(theirs, offsets, **options, backend=each) for each in ("cuda", "torch")
    )
    assert torch.equal(ours, again)


def test_gradients_of_packing_are_those_of_torch():
    lengths = torch.randint(0, 130, (64,))
    offsets = cu_seqlens_from_lengths(lengths).cuda()
    total = int(lengths.sum())
    x = torch.randn(64, 129, 520, device="cuda", requires_grad=True)
    y = torch.randn(total, 520, device="cuda", requires_grad=True)
    grad_y, grad_x = torch.randn_like(y), torch.randn_like(x)
    found = []
    for backend in ("cuda", "torch"):
        packed = pack_sequence(x, offsets, total_tokens=total, backend=backend)
        padded = unpack_sequence(y, offsets, batch_size=64, max_seqlen=129, backend=backend)
        found.append(
            (*torch.autograd.grad(packed, x, grad_y), *torch.autograd.grad(padded, y, grad_x))
        )
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("experts", [1, 8, 128, 1000, 1300, 20000])
@pytest.mark.parametrize("size", [1, 1000, 262144, 3_000_001])
def test_many_entries_are_counted_and_sorted(size, experts, integer):
    indices = torch.randint(experts, (size,), device="cuda", dtype=integer)
    # Most entries at one expert: additions to one address.
    indices[::2] = experts // 2
    for x in (indices, shifted(indices)):
        counts = continuous_count(x, experts, backend="cuda")
        expected = torch.bincount(indices, minlength=experts)
        assert torch.equal(counts.long(), expected)
        order, ends, position = sort_by_expert(x, experts, backend="cuda")
        assert torch.equal(order.long(), torch.sort(indices, stable=True).indices)
        assert torch.equal(ends.long(), expected.cumsum(0))
        assert torch.equal(order[position.long()], torch.arange(size, device="cuda").int())


def test_the_first_launch_may_be_captured():
    gate, up = (torch.randn(64, 512, device="cuda", dtype=torch.float16) for _ in range(2))
    expected = swiglu(gate, up, backend="torch")
    # As in a process that has not launched it: compiled and loaded while the graph is captured.
    _cuda_rows._plan.cache_clear()
    cuda_driver.kernel.cache_clear()
    cuda_driver._module.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = swiglu(gate, up, backend="cuda")
    y.zero_()
    graph.replay()
    torch.testing.assert_close(y, expected)


def test_a_graph_reads_what_its_inputs_hold_at_replay():
    indices = torch.randint(16, (5000,), device="cuda")
    sort_by_expert(indices, 16, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        order, ends, _ = sort_by_expert(indices, 16, backend="cuda")
        counts = continuous_count(indices, 16, backend="cuda")
    for _ in range(3):
        indices.random_(0, 16)
        graph.replay()
        assert torch.equal(order.long(), torch.sort(indices, stable=True).indices)
        assert torch.equal(counts.cumsum(0).int(), ends)


def test_threads_and_streams_of_their_own():
    gate, up = (torch.randn(512, 4096, device="cuda") for _ in range(2))
    expected = swiglu(gate, up, backend="torch")
    torch.cuda.synchronize()
    results = {}

    def work(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                results[number] = swiglu(gate, up, backend="cuda")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    torch.cuda.synchronize()
    assert len(results) == 4
    for y in results.values():
        torch.testing.assert_close(y, expected)


def test_a_thread_that_has_done_nothing_yet_can_launch():
    launched = []
    kernel = cuda_driver.kernel(
        "ops/continuous_count/_cuda.cu", "count_global", "PPqii", ("INTEGER=int",), 0
    )
    x, counts = (torch.zeros(8, dtype=torch.int32, device="cuda") for _ in range(2))
    torch.cuda.synchronize()

    def work():
        kernel(1, (32, 1), x.data_ptr(), counts.data_ptr(), 8, 8, 0)
        launched.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert launched
    assert counts.tolist() == [8, 0, 0, 0, 0, 0, 0, 0]


def test_a_launch_that_the_driver_refuses_is_an_error():
    kernel = cuda_driver.kernel(
        "ops/continuous_count/_cuda.cu", "count_global", "PPqii", ("INTEGER=int",), 0
    )
    with pytest.raises(
        cuda_driver.CudaDriverError, match="launching `count_global` with 1 blocks of 4096"
    ):
        kernel(1, (4096, 1), 0, 0, 0, 0, 0)


@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
def test_compiled_code_calls_the_kernel(layout):
    torch._dynamo.reset()
    x = torch.randn(64, 768, device="cuda", requires_grad=True)

    def function(x):
        return swiglu_packed(x * 2, layout=layout, backend="cuda") + 1

    ours, theirs = torch.compile(function, fullgraph=True)(x), function(x)
    torch.testing.assert_close(ours, theirs)
    (of_ours,) = torch.autograd.grad(ours.sum(), x)
    (of_theirs,) = torch.autograd.grad(theirs.sum(), x)
    torch.testing.assert_close(of_ours, of_theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        lambda x: swiglu(x, x, backend="cuda"),
        lambda x: swiglu_packed(x, backend="cuda"),
        lambda x: swiglu_packed(x, layout="concatenated", backend="cuda"),
        # 16 bytes do not divide the strides.
        lambda x: swiglu_packed(x[:, :-2], backend="cuda"),
    ],
)
def test_more_than_two_to_the_31_elements(function):
    H = 8192
    rows = 2**31 // H + 17
    x = torch.empty(rows, H, device="cuda", dtype=torch.bfloat16).normal_()
    x.requires_grad_()
    y = function(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    # Rows on both sides of the limit and the last one.
    for row in (0, 2**31 // H - 1, 2**31 // H, rows - 1):
        alone = x[row : row + 1].detach().clone().requires_grad_()
        expected = function(alone)
        assert torch.equal(y[row : row + 1], expected)
        (of_alone,) = torch.autograd.grad(expected.sum(), alone)
        assert torch.equal(grad[row : row + 1], of_alone)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements_are_packed():
    B, S, H = 2, 2**17, 8200
    x = torch.empty(B, S, H, device="cuda", dtype=torch.uint8).random_()
    offsets = torch.tensor([0, S - 5, 2 * S - 5], device="cuda")
    y = pack_sequence(x, offsets, total_tokens=2 * S - 5, backend="cuda")
    assert torch.equal(y[: S - 5], x[0, 5:])
    assert torch.equal(y[S - 5 :], x[1])
    back = unpack_sequence(y, offsets, batch_size=B, max_seqlen=S, backend="cuda")
    assert torch.equal(back[0, 5:], x[0, 5:])
    assert torch.equal(back[1], x[1])
    assert not back[0, :5].any()

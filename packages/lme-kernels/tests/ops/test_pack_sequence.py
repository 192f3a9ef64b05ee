import pytest
import torch

from lme_kernels.functional import pack_sequence, unpack_sequence
from lme_kernels.ops.pack_sequence import PACK_SEQUENCE
from lme_kernels.packing import cu_seqlens_from_lengths, position_ids, sequence_ids
from lme_kernels.testing import fused_backends

# A full row, empty ones at both ends and in the middle.
LENGTHS = [0, 5, 3, 0, 1, 0]
B, S, T = 6, 5, 9


def offsets():
    return cu_seqlens_from_lengths(torch.tensor(LENGTHS))


def naive_pack(x, side):
    rows = [
        row[len(row) - length :] if side == "left" else row[:length]
        for row, length in zip(x, LENGTHS, strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", ["torch", *fused_backends(PACK_SEQUENCE)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64], ids=str)
def test_packing_is_a_loop_over_rows(side, backend, dtype):
    x = (torch.randn(B, S, 3) * 4).to(dtype)
    ours = pack_sequence(x, offsets(), total_tokens=T, padding_side=side, backend=backend)
    assert torch.equal(ours, naive_pack(x, side))
    back = unpack_sequence(
        ours, offsets(), batch_size=B, max_seqlen=S, padding_side=side, backend=backend
    )
    assert torch.equal(naive_pack(back, side), ours)
    assert int((back != 0).sum()) == int((ours != 0).sum())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", ["torch", *fused_backends(PACK_SEQUENCE)])
def test_gradients_are_those_of_the_loop(side, backend):
    x = torch.randn(B, S, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(T, 3, dtype=torch.float64)
    packed = pack_sequence(x, offsets(), total_tokens=T, padding_side=side, backend=backend)
    (ours,) = torch.autograd.grad(packed, x, weight)
    (theirs,) = torch.autograd.grad(naive_pack(x, side), x, weight)
    assert torch.equal(ours, theirs)
    y = torch.randn(T, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(B, S, 3, dtype=torch.float64)
    options = {"batch_size": B, "max_seqlen": S, "padding_side": side, "backend": backend}
    (ours,) = torch.autograd.grad(unpack_sequence(y, offsets(), **options), y, weight)
    assert torch.equal(ours, naive_pack(weight, side))


def test_several_tensors_give_a_list():
    x, y = torch.randn(B, S), torch.randn(B, S, 2)
    packed = pack_sequence([x, y], offsets())
    assert torch.equal(packed[0], naive_pack(x, "left"))
    assert torch.equal(packed[1], naive_pack(y, "left"))
    back = unpack_sequence(packed, offsets(), batch_size=B, max_seqlen=S)
    assert [each.shape for each in back] == [x.shape, y.shape]


def test_pads_hold_the_value_asked_for():
    padded = unpack_sequence(
        torch.arange(1, T + 1), offsets(), batch_size=B, max_seqlen=S, pad_value=-100
    )
    assert padded.tolist()[:3] == [[-100] * 5, [1, 2, 3, 4, 5], [-100, -100, 6, 7, 8]]


def test_ids_and_positions_count_within_sequences():
    assert offsets().tolist() == [0, 0, 5, 8, 8, 9, 9]
    assert offsets().dtype == torch.int32
    assert sequence_ids(offsets(), 10).tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 4, 6]
    assert position_ids(offsets(), 10).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 2])}, "must have 7 entries for 6 sequences, got 2"),
        ({"cu_seqlens": torch.zeros(7)}, "must be int32 or int64, got torch.float32"),
        ({"padding_side": "middle"}, "`padding_side` must be"),
        ({"x": torch.randn(4)}, r"`x` must have shape \(B, S, ...\), got \(4,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    arguments = {"x": torch.randn(B, S), "cu_seqlens": offsets(), "total_tokens": T, **change}
    with pytest.raises(ValueError, match=message):
        pack_sequence(**arguments)

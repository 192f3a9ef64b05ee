import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lme_convert.rules import (
    Chain,
    Concatenate,
    GroupedQKV,
    InGroups,
    Interleave,
    Inverse,
    Permute,
    Rename,
    Stack,
)

sizes = st.integers(1, 5)


def numbered(*shapes):
    """Tensors whose entries are all different, so that a misplaced one is seen."""
    tensors, start = [], 0
    for shape in shapes:
        count = torch.Size(shape).numel()
        tensors.append(torch.arange(start, start + count).view(shape))
        start += count
    return tensors


def assert_inverse(transform, theirs, names):
    ours = transform.to_ours(theirs, names)
    assert sum(each.numel() for each in ours) == sum(each.numel() for each in theirs)
    back = transform.to_theirs([each.contiguous() for each in ours], names)
    assert all(torch.equal(one, other) for one, other in zip(back, theirs, strict=True))
    again = transform.to_ours(back, names)
    assert all(torch.equal(one, other) for one, other in zip(again, ours, strict=True))
    # The same on one value seen at every index, as shapes are checked.
    byte = torch.zeros((), dtype=torch.uint8)
    made = transform.to_theirs([byte.expand(each.shape) for each in ours], names)
    assert [each.shape for each in made] == [each.shape for each in theirs]
    return ours


@given(st.lists(sizes, min_size=0, max_size=3))
def test_rename_keeps_a_tensor_of_any_shape(shape):
    (ours,) = assert_inverse(Rename(), numbered(shape), {})
    assert torch.equal(ours, numbered(shape)[0])


@given(sizes, sizes, sizes, st.integers(0, 1))
def test_concatenate_is_inverted_at_uneven_lengths(first, second, other, dim):
    shapes = [(length, other) if dim == 0 else (other, length) for length in (first, second)]
    transform = Concatenate(("first", "second"), dim)
    theirs = numbered(*shapes)
    (ours,) = assert_inverse(transform, theirs, {"first": first, "second": second})
    assert torch.equal(ours.narrow(dim, first, second), theirs[1])


@given(sizes, sizes, sizes)
def test_stack_is_inverted(count, rows, columns):
    theirs = numbered(*[(rows, columns)] * count)
    (ours,) = assert_inverse(Stack(), theirs, {})
    assert torch.equal(ours[count - 1], theirs[-1])


@given(sizes, st.integers(1, 3), st.booleans())
def test_interleave_takes_rows_in_turn(rows, parts, bias):
    theirs = numbered(*[(rows,) if bias else (rows, 3)] * parts)
    (ours,) = assert_inverse(Interleave(parts), theirs, {})
    for place, tensor in enumerate(theirs):
        assert torch.equal(ours[place::parts], tensor)


@given(sizes, sizes, sizes, st.booleans())
def test_grouped_qkv_has_each_group_together(groups, queries, head_dim, bias):
    names = {
        "num_attention_heads": groups * queries,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
    }
    rows = [groups * queries * head_dim, groups * head_dim, groups * head_dim]
    theirs = numbered(*[(each,) if bias else (each, 3) for each in rows])
    (ours,) = assert_inverse(GroupedQKV(), theirs, names)
    size = (queries + 2) * head_dim
    for group in range(groups):
        of_group = ours[group * size : (group + 1) * size]
        heads = theirs[0][group * queries * head_dim : (group + 1) * queries * head_dim]
        assert torch.equal(of_group[: queries * head_dim], heads)
        for place, tensor in ((queries, theirs[1]), (queries + 1, theirs[2])):
            expected = tensor[group * head_dim : (group + 1) * head_dim]
            assert torch.equal(of_group[place * head_dim : (place + 1) * head_dim], expected)


@given(st.permutations(range(3)), st.lists(sizes, min_size=3, max_size=3))
def test_permute_is_inverted_in_any_order(dims, shape):
    theirs = numbered(shape)
    (ours,) = assert_inverse(Permute(tuple(dims)), theirs, {})
    assert torch.equal(ours, theirs[0].permute(*dims))


@given(sizes, sizes, sizes)
def test_experts_are_stacked_then_interleaved(experts, rows, columns):
    """Gates of all experts, ups of all experts -> (expert, 2 * row, column)."""
    transform = Chain((InGroups(Stack(), 2), Interleave(dim=1)))
    theirs = numbered(*[(rows, columns)] * (2 * experts))
    (ours,) = assert_inverse(transform, theirs, {})
    assert torch.equal(ours[experts - 1, 0::2], theirs[experts - 1])
    assert torch.equal(ours[experts - 1, 1::2], theirs[-1])


@given(sizes, sizes)
def test_a_fused_projection_is_regrouped(groups, head_dim):
    """One tensor [all queries; all keys; all values] -> one grouped tensor."""
    names = {
        "num_attention_heads": 2 * groups,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "queries": 2 * groups * head_dim,
        "keys": groups * head_dim,
    }
    transform = Chain((Inverse(Concatenate(("queries", "keys", "keys"))), GroupedQKV()))
    assert_inverse(transform, numbered((4 * groups * head_dim, 2)), names)


def test_tensors_that_do_not_fit_are_refused():
    names = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3}
    with pytest.raises(ValueError, match="key must have 6 rows, got 12"):
        GroupedQKV().to_ours(numbered((12, 5), (12, 5), (6, 5)), names)
    with pytest.raises(ValueError, match="`a` = 2 entries, got 3"):
        Concatenate(("a", "b")).to_ours(numbered((3, 1), (2, 1)), {"a": 2, "b": 2})
    with pytest.raises(ValueError, match="2 tensors are interleaved, got 3"):
        Interleave().to_ours(numbered((1,), (1,), (1,)), {})
    with pytest.raises(ValueError, match="do not make 2 equal groups"):
        InGroups(Stack(), 2).to_ours(numbered((1,), (1,), (1,)), {})

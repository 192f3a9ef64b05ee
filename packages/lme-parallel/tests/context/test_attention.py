"""Attention over sequences that are cut is that over whole ones, and so are its gradients."""

import pytest
import torch
from torch import distributed

from lme_parallel.context.attention import ContextAttention
from lme_parallel.context.batch import CutBatch
from lme_parallel.context.layout import Layout
from lme_parallel.context.ring import Ring
from lme_parallel.tensor.collectives import Group
from lme_parallel.testing import run_distributed

B, S = 2, 24
GROUPED = {"heads": (4, 2), "channels": (6, 6)}
# Bounds in the middle of pieces, at their ends (3, 6, 12 of 24), of one token, over several pieces.
PACKED = [0, 1, 6, 11, 12, 24, 31, 48]
CASES = {
    "plain": GROUPED,
    "every head its own": {"heads": (3, 3), "channels": (4, 4)},
    "one key for all, longer than its value": {"heads": (4, 1), "channels": (6, 4)},
    "shorter than its value": {"heads": (2, 2), "channels": (4, 6), "scale": 0.3},
    "window": {**GROUPED, "window": 5},
    "window of one piece": {**GROUPED, "window": 6},
    "window of one": {**GROUPED, "window": 1},
    "window over all": {**GROUPED, "window": 100},
    "bound": {**GROUPED, "softcap": 0.7},
    "sinks": {**GROUPED, "sinks": True},
    "documents": {**GROUPED, "documents": True},
    "everything": {**GROUPED, "documents": True, "window": 5, "softcap": 0.7, "sinks": True},
}
CUTS = [(ring, balanced) for ring in (False, True) for balanced in (False, True)]


def dense(query, key, value, *, causal, scale, window, softcap, cu_seqlens, mask, sinks):
    """Attention by its definition; the last query is at the last key."""
    assert causal
    assert mask is None
    groups = query.shape[2] // key.shape[2]
    key, value = (each.repeat_interleave(groups, dim=2) for each in (key, value))
    scores = torch.einsum("bsnd,btnd->bnst", query, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    T = key.shape[1]
    distance = torch.arange(T - query.shape[1], T)[:, None] - torch.arange(T)
    seen = (distance >= 0) & (distance < (T if window is None else window))
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(B * T), cu_seqlens.long(), right=True).view(B, T)
        seen = seen & (document[:, :, None] == document[:, None])[:, None]
    powers = scores.masked_fill(~seen, float("-inf")).exp()
    total = powers.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    return torch.einsum("bnst,btnd->bsnd", powers / total, value)


def make(case, seed=0):
    """Query, key, value, sinks, gradient of the output, and options."""
    options = CASES[case]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    (N, K), (D, V) = options["heads"], options["channels"]
    tensors = [normal(B, S, N, D), normal(B, S, K, D), normal(B, S, K, V)]
    tensors.append(normal(N) if options.get("sinks") else None)
    bounds = torch.tensor(PACKED, dtype=torch.int32) if options.get("documents") else None
    return (
        tensors,
        normal(B, S, N, V),
        {
            "causal": True,
            "scale": options.get("scale", D**-0.5),
            "window": options.get("window"),
            "softcap": options.get("softcap"),
            "cu_seqlens": bounds,
            "mask": None,
        },
    )


def run(attend, tensors, grad, options):
    query, key, value, sinks = (
        None if each is None else each.clone().requires_grad_() for each in tensors
    )
    output = attend(query, key, value, sinks=sinks, **options)
    output.backward(grad)
    gradients = [query.grad, key.grad, value.grad, None if sinks is None else sinks.grad]
    return [output.detach(), *gradients]


def attend_cut(cuts):
    """What each case gives in each cut."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    processes = distributed.group.WORLD
    group, ring = Group(processes.group_name, size, rank), Ring(processes, size, rank)
    found = {}
    for is_ring, is_balanced in cuts:
        layout = Layout(size, rank, is_balanced)
        attend = ContextAttention(dense, layout, group, ring if is_ring else None)
        for case in CASES:
            (*tensors, sinks), grad, options = make(case)
            tensors = [layout.cut(each) for each in tensors]
            results = run(attend, [*tensors, sinks], layout.cut(grad), options)
            found[f"{is_ring} {is_balanced} {case}"] = [
                torch.zeros(()) if each is None else each for each in results
            ]
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_it_is_that_over_whole_sequences(size):
    # Of four processes one cut each: more of them show nothing else.
    cuts = CUTS if size == 2 else [CUTS[1], CUTS[2]]
    ranks = run_distributed(attend_cut, size, cuts)
    for is_ring, is_balanced in cuts:
        layout = Layout(size, 0, is_balanced)
        for case in CASES:
            expected = run(dense, *make(case))
            key = f"{is_ring} {is_balanced} {case}"
            for number in range(4):
                whole = layout.join([each[key][number] for each in ranks])
                torch.testing.assert_close(whole, expected[number], rtol=1e-10, atol=1e-10)
            if expected[4] is not None:
                # Each process has the share of its own queries.
                total = sum(each[key][4] for each in ranks)
                torch.testing.assert_close(total, expected[4], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("balanced", [False, True])
def test_pieces_of_all_processes_are_the_sequence(size, balanced):
    layouts = [Layout(size, rank, balanced) for rank in range(size)]
    x = torch.arange(2 * layouts[0].num_pieces * 3).view(2, -1)
    assert torch.equal(layouts[0].join([each.cut(x) for each in layouts]), x)
    for each in layouts:
        assert [each.owner(piece) for piece in each.pieces()] == [each.rank] * each.pieces_each
        starts = torch.tensor(each.starts(3))
        assert torch.equal(each.cut(x)[0].view(-1, 3)[:, 0], starts)


def test_balanced_pieces_meet_as_many_keys_on_every_process():
    seen = []
    for rank in range(4):
        layout = Layout(4, rank, True)
        seen.append(sum(start + place + 1 for start in layout.starts(5) for place in range(5)))
    assert len(set(seen)) == 1


def test_a_batch_is_padded_and_cut():
    ids = torch.arange(1, 11).view(2, 5)
    batch = {
        "input_ids": ids,
        "labels": ids + 1,
        "token_index": ids - 1,
        "cu_seqlens": torch.tensor([0, 3, 5, 10], dtype=torch.int32),
        "dropout_key": torch.tensor(7),
        "source": torch.tensor([0, 1]),
    }
    first, second = (CutBatch(Layout(2, rank, True))(batch) for rank in range(2))
    # Eight tokens in pieces of two; the first process has the first and the last.
    assert first["input_ids"].tolist() == [[1, 2, 0, 0], [6, 7, 0, 0]]
    assert second["input_ids"].tolist() == [[3, 4, 5, 0], [8, 9, 10, 0]]
    assert first["labels"].tolist() == [[2, 3, -100, -100], [7, 8, -100, -100]]
    assert second["position_ids"].tolist() == [[2, 3, 4, 0]] * 2
    assert first["valid"].tolist() == [[True, True, False, False]] * 2
    assert first["cu_seqlens"].tolist() == [0, 3, 8, 16]
    assert (int(first["sequences"]), int(second["sequences"])) == (2, 0)
    assert first["dropout_key"] == 7
    assert second["source"].tolist() == [0, 1]


def test_a_batch_that_fits_has_no_padding():
    ids = torch.arange(12).view(2, 6)
    cut = CutBatch(Layout(3, 1, False))({"input_ids": ids, "labels": ids})
    assert cut["input_ids"].tolist() == [[2, 3], [8, 9]]
    assert "valid" not in cut


@pytest.mark.parametrize(
    "wrong",
    [{"causal": False}, {"mask": torch.zeros(1, 1, 4, 4)}, {"key": torch.zeros(1, 5, 2, 4)}],
)
def test_what_it_cannot_do_is_refused(wrong):
    group = Group("none", 2, 0)
    attend = ContextAttention(dense, Layout(2, 0, False), group, None)
    tensors = {name: torch.zeros(1, 4, 2, 4) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match="`context_parallel_world_size` above 1 needs causal"):
        attend(**{**tensors, **wrong})

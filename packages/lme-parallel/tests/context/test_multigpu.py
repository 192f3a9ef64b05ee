"""Context-parallel layouts on GPUs compute what one process computes."""

import pytest
import torch
from torch import distributed
from torch.nn import functional as F

from lme_parallel.context.attention import ContextAttention
from lme_parallel.context.layout import Layout
from lme_parallel.context.ring import Ring
from lme_parallel.equality import compare_layout
from lme_parallel.tensor.collectives import Group
from lme_parallel.testing import run_distributed

pytestmark = pytest.mark.multigpu

TWO = {"context_parallel_world_size": 2}
BALANCED = {"context_parallel_load_balancing_method": "headtail"}
RING = {"context_parallel_attention": "ring"}
LAYOUTS = {
    "collected": {**TWO, "stage": 3},
    "collected, balanced, compiled": {**TWO, **BALANCED, "torch_compile": True},
    "ring": {**TWO, **RING, "stage": 0, "fsdp_algorithm": None},
    "ring, balanced": {**TWO, **RING, **BALANCED, "gradient_checkpointing_method": "full"},
}
B, S = 2, 1024
# Bounds inside pieces of 256, at their ends, and a document over several pieces.
PACKED = [0, 5, 256, 900, 1024, 1500, 2048]
CASES = {
    "plain": {},
    "documents": {"documents": True},
    "window": {"window": 300},
    "documents, window": {"documents": True, "window": 300},
    "shorter values": {"value": 48},
    "documents, shorter values": {"documents": True, "value": 48},
    "sinks": {"sinks": True},
    "documents, sinks": {"documents": True, "sinks": True},
    "bound": {"softcap": 5.0},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_gpus_compute_what_one_process_computes(name):
    found = compare_layout(LAYOUTS[name], 2, device_type="cuda", options={"dropout": 0.2})
    assert [found.pop(each) for each in ("initial", "copies", "targets")] == [0.0] * 3
    assert max(found.values()) < 1e-10, found


def dense(query, key, value, *, causal, scale, window, softcap, cu_seqlens, mask, sinks):
    """Attention by its definition, in fp32; the last query is at the last key."""
    dtype, groups = query.dtype, query.shape[2] // key.shape[2]
    query = query.float()
    key, value = (each.float().repeat_interleave(groups, dim=2) for each in (key, value))
    scores = torch.einsum("bsnd,btnd->bnst", query, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    T = key.shape[1]
    places = torch.arange(T, device=query.device)
    distance = places[T - query.shape[1] :, None] - places
    seen = (distance >= 0) & (distance < (T if window is None else window))
    if cu_seqlens is not None:
        tokens = torch.arange(B * T, device=query.device)
        document = torch.bucketize(tokens, cu_seqlens.long(), right=True).view(B, T)
        seen = seen & (document[:, :, None] == document[:, None])[:, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(B, -1, scores.shape[2], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(-1)[..., :T]
    return torch.einsum("bnst,btnd->bsnd", weights, value).to(dtype)


def inputs(case, device):
    options = CASES[case]
    generator = torch.Generator().manual_seed(0)
    V = options.get("value", 64)
    shapes = [(B, S, 4, 64), (B, S, 2, 64), (B, S, 2, V), (B, S, 4, V)]
    tensors = [torch.randn(each, generator=generator).to(device, torch.bfloat16) for each in shapes]
    sinks = torch.randn(4, generator=generator).to(device) if "sinks" in options else None
    bounds = torch.tensor(PACKED, dtype=torch.int32, device=device)
    settings = {
        "causal": True,
        "scale": 0.125,
        "window": options.get("window"),
        "softcap": options.get("softcap"),
        "cu_seqlens": bounds if "documents" in options else None,
        "mask": None,
    }
    return tensors, sinks, settings


def run(attend, tensors, sinks, settings):
    query, key, value = (each.clone().requires_grad_() for each in tensors[:3])
    sinks = None if sinks is None else sinks.clone().requires_grad_()
    output = attend(query, key, value, sinks=sinks, **settings)
    output.backward(tensors[3])
    return output.detach(), query.grad, key.grad, value.grad, None if sinks is None else sinks.grad


def differences():
    """Relative errors by cut, case and result; of sinks those of the sum over processes."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    processes = distributed.group.WORLD
    group, ring = Group(processes.group_name, size, rank), Ring(processes, size, rank)
    found = {}
    for case in CASES:
        tensors, sinks, settings = inputs(case, device)
        exact = [each.float() for each in tensors]
        expected = run(dense, exact, sinks, settings)
        for is_ring in (False, True):
            layout = Layout(size, rank, True)
            attend = ContextAttention(dense, layout, group, ring if is_ring else None)
            results = run(attend, [layout.cut(each) for each in tensors], sinks, settings)
            for number in range(4):
                truth = layout.cut(expected[number])
                error = (results[number].float() - truth).norm() / truth.norm()
                found[f"{case}, ring={is_ring}, {number}"] = error.cpu()
            if sinks is not None:
                total = results[4].clone()
                distributed.all_reduce(total)
                error = (total - expected[4]).norm() / expected[4].norm()
                found[f"{case}, ring={is_ring}, sinks"] = error.cpu()
    return found


def test_bf16_attention_is_that_of_fp32_but_for_roundings():
    for found in run_distributed(differences, 2, device_type="cuda"):
        # Results are rounded to bf16, by at most 2**-9; kernels round weights as well, and sum
        # differently.
        wrong = {name: float(error) for name, error in found.items() if not error < 2**-6}
        assert not wrong


def attend_twice():
    """Whether a ring gives the same bits twice."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    processes = distributed.group.WORLD
    layout = Layout(size, rank, False)
    attend = ContextAttention(
        F.scaled_dot_product_attention,
        layout,
        Group(processes.group_name, size, rank),
        Ring(processes, size, rank),
    )
    tensors, sinks, settings = inputs("plain", device)
    tensors = [layout.cut(each) for each in tensors]
    first, second = (run(attend, tensors, sinks, settings)[0] for _ in range(2))
    return torch.equal(first, second)


def test_a_ring_gives_the_same_bits_twice():
    assert run_distributed(attend_twice, 2, device_type="cuda") == [True, True]

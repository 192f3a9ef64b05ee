"""Tokens reach their experts, and results and gradients come back, whoever has how many."""

import pytest
import torch
from torch import distributed

from lme_parallel.expert.exchange import Exchange
from lme_parallel.testing import run_distributed

H, EXPERTS = 3, 2
# Tokens of each process, choices of each, and the experts that may be chosen.
CASES = {
    "even": ([4, 4], 2, range(4)),
    "uneven": ([1, 5], 2, range(4)),
    "one choice": ([3, 2], 1, range(4)),
    "all to the first process": ([3, 4], 2, range(2)),
    "all to the last expert": ([3, 4], 1, [3]),
    "none here": ([0, 3], 2, range(4)),
    "none anywhere": ([0, 0], 2, range(4)),
}
DTYPES = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2**-6}


def problem(case, dtype, rank):
    """Tokens, weights and choices of a process, and what the output is multiplied by."""
    tokens, k, allowed = CASES[case]
    generator = torch.Generator().manual_seed(rank + 7 * len(case))
    T, E = tokens[rank], len(allowed)
    x, factor = torch.randn(2, T, H, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(T, k, generator=generator, dtype=torch.float64)
    weights = weights.to(torch.promote_types(dtype, torch.float32))
    order = torch.rand(T, E, generator=generator).argsort(-1)[:, :k]
    return x.requires_grad_(), weights.requires_grad_(), torch.tensor(list(allowed))[order], factor


def expert(x, number):
    """Of the expert with that number among all."""
    return torch.sin(x * (number + 1)) + number


def travel(case, dtype_name):
    rank, size = distributed.get_rank(), distributed.get_world_size()
    world = distributed.group.WORLD
    exchange = Exchange(world.group_name, size, EXPERTS)
    x, weights, indices, factor = problem(case, getattr(torch, dtype_name), rank)
    sent = exchange.dispatch(x, weights, indices)
    numbers = sent.indices + rank * EXPERTS
    assert sent.x.shape == (len(numbers), H)
    assert sent.weights.shape == sent.indices.shape == (len(numbers), 1)
    assert not len(numbers) or 0 <= sent.indices.min() <= sent.indices.max() < EXPERTS
    y = exchange.combine(sent.weights.to(x.dtype) * expert(sent.x, numbers), sent.receipt)
    (y * factor).sum().backward()
    return [y.detach(), x.grad, weights.grad, torch.tensor(len(numbers))]


def expected(case, dtype_name, rank):
    x, weights, indices, factor = problem(case, getattr(torch, dtype_name), rank)
    each = expert(x.unsqueeze(1), indices.unsqueeze(-1))
    y = (weights.unsqueeze(-1).to(x.dtype) * each).sum(1)
    (y * factor).sum().backward()
    return [y.detach(), x.grad, weights.grad]


def travel_all():
    return {dtype: {case: travel(case, dtype) for case in CASES} for dtype in DTYPES}


@pytest.fixture(scope="module")
def travelled():
    return run_distributed(travel_all, 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients_are_those_without_travelling(case, dtype, travelled):
    for rank, found in enumerate(travelled):
        *actual, _ = found[dtype][case]
        for one, other in zip(actual, expected(case, dtype, rank), strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=DTYPES[dtype], atol=4 * DTYPES[dtype])


def test_a_row_is_sent_for_each_choice_and_none_is_dropped(travelled):
    for case, (tokens, k, _) in CASES.items():
        came = [int(found["float32"][case][3]) for found in travelled]
        assert sum(came) == sum(tokens) * k
        if case == "all to the first process":
            assert came == [sum(tokens) * k, 0]
        if case == "all to the last expert":
            assert came == [0, sum(tokens) * k]

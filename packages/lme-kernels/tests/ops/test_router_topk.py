import pytest
import torch
from torch.nn import functional as F

from lme_kernels.functional import continuous_count, router_topk, sort_by_expert
from lme_kernels.ops.router_topk import ROUTER_TOPK
from lme_kernels.testing import fused_backends

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def naive(row, k, score, normalize, bias):
    """One token in a loop: score, choose the best one k times, weigh."""
    scores = row.softmax(0) if score == "softmax" else 1 / (1 + (-row).exp())
    left = {
        e: s.item() + (0.0 if bias is None else float(bias[e]))
        for e, s in enumerate(scores.detach())
    }
    chosen = []
    for _ in range(k):
        chosen.append(max(left, key=lambda e: left[e]))
        del left[chosen[-1]]
    weights = torch.stack([scores[e] for e in chosen])
    return (weights / weights.sum() if normalize else weights), chosen


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("biased", [False, True])
def test_weights_experts_and_gradients_are_those_of_a_loop(score, normalize, biased):
    logits, bias = double(6, 7), torch.randn(7, dtype=torch.float64) if biased else None
    weights, indices = router_topk(logits, 3, score=score, normalize=normalize, bias=bias)
    loop = [naive(row, 3, score, normalize, bias) for row in logits]
    assert indices.tolist() == [chosen for _, chosen in loop]
    theirs = torch.stack([each for each, _ in loop])
    torch.testing.assert_close(weights, theirs, **EXACT)
    factor = torch.randn_like(weights)
    ours = torch.autograd.grad(weights, logits, factor)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(theirs, logits, factor)[0], **EXACT)


def test_normalised_shares_are_the_softmax_of_the_top_logits():
    logits = double(6, 7)
    values, order = logits.topk(2)
    weights, indices = router_topk(logits, 2)
    torch.testing.assert_close(weights, F.softmax(values, -1), **EXACT)
    assert torch.equal(indices, order)


@pytest.mark.parametrize("backend", ["torch", *fused_backends(ROUTER_TOPK)])
def test_equal_scores_go_to_the_lower_expert_and_minus_infinity_comes_last(backend):
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0], [-torch.inf, 0.0, -torch.inf, -torch.inf]])
    weights, indices = router_topk(logits, 3, normalize=False, backend=backend)
    assert indices.tolist() == [[1, 2, 0], [1, 0, 2]]
    assert weights[1].tolist() == [1.0, 0.0, 0.0]


def test_the_bias_moves_choices_and_not_weights():
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    bias = torch.tensor([-5.0, 0.0, 0.0], requires_grad=True)
    weights, indices = router_topk(logits, 1, score="sigmoid", normalize=False, bias=bias)
    assert indices.tolist() == [[1]]
    torch.testing.assert_close(weights, torch.sigmoid(logits[:, 1:2]))
    assert not weights.requires_grad


@pytest.mark.parametrize("bins", [1, 5, 600])
def test_counts_are_those_of_bincount(bins):
    x = torch.randint(0, bins, (300,))
    assert torch.equal(continuous_count(x, bins).long(), torch.bincount(x, minlength=bins))
    assert continuous_count(torch.tensor([-1, 0, bins]), bins).sum() == 1


def test_the_order_is_stable_and_its_inverse_too():
    experts = [2, 0, 2, 1, 0, 2]
    order, offsets, position = sort_by_expert(torch.tensor(experts).view(3, 2), 4)
    assert order.tolist() == [1, 4, 3, 0, 2, 5]
    assert offsets.tolist() == [2, 3, 6, 6]
    assert position.tolist() == [3, 0, 4, 2, 1, 5]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: router_topk(torch.randn(2, 3), 4), "between 1 and the 3 experts"),
        (lambda: router_topk(torch.randn(2, 3), 1, score="max"), "`score` must be"),
        (lambda: router_topk(torch.randn(2, 3), 1, bias=torch.randn(2)), r"shape \(3,\)"),
        (lambda: continuous_count(torch.randn(3), 2), "`x` must be int32 or int64"),
        (lambda: continuous_count(torch.arange(3), 0), "`bins` must be at least 1"),
        (lambda: sort_by_expert(torch.arange(3), 0), "`num_experts` must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        function()

import math

import pytest
import torch

from lme_core.layers.context import SequenceContext
from lme_core.layers.dropout import check_probability, dropout

KEY = torch.tensor(1234567)


def inputs(B=4, S=64, C=96):
    index = torch.arange(B * S).view(B, S)
    return torch.ones(B, S, C, requires_grad=True), index


def test_it_drops_the_share_asked_for_and_keeps_the_mean():
    x, index = inputs()
    y = dropout(x, 0.3, KEY, 0, index)
    share = (y == 0).double().mean()
    assert abs(share - 0.3) < 5 * math.sqrt(0.21 / y.numel())
    assert torch.equal(y[y != 0], torch.full_like(y[y != 0], 1 / 0.7))


def test_the_gradient_has_the_same_mask():
    x, index = inputs()
    y = dropout(x, 0.3, KEY, 0, index)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y.detach())


def test_the_mask_is_the_same_however_the_batch_is_cut():
    x, index = inputs()
    whole = dropout(x, 0.5, KEY, 3, index)
    rows = torch.cat([dropout(x[i : i + 1], 0.5, KEY, 3, index[i : i + 1]) for i in range(4)])
    halves = zip(x.chunk(2, 1), index.chunk(2, 1), strict=True)
    columns = torch.cat([dropout(part, 0.5, KEY, 3, i) for part, i in halves], dim=1)
    assert torch.equal(rows, whole)
    assert torch.equal(columns, whole)


def test_layers_sites_steps_and_tokens_have_unrelated_masks():
    x, index = inputs()
    context = SequenceContext(dropout_key=KEY)
    layers = [context.at_layer(layer).dropout_key for layer in range(3)]
    masks = [
        *(dropout(x, 0.5, key, 0, index) for key in layers),
        dropout(x, 0.5, layers[0], 1, index),
        dropout(x, 0.5, KEY + 1, 0, index),
        dropout(x, 0.5, layers[0], 0, index + 1),
    ]
    correlation = torch.corrcoef(torch.stack([mask.detach().flatten() for mask in masks]))
    assert (correlation - torch.eye(6)).abs().max() < 5 / math.sqrt(x.numel())


def test_without_a_key_nothing_drops():
    x, index = inputs()
    assert dropout(x, 0.5, None, 0, index) is x


def test_a_probability_out_of_range_is_refused_by_name():
    with pytest.raises(ValueError, match="`embedding_dropout`"):
        check_probability("embedding_dropout", 1.0)

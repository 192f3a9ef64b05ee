"""What does not work with sequences that are cut is refused by name."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lme_parallel.context.layout import Layout
from lme_parallel.context.recurrence import cut_recurrence
from lme_parallel.context.ring import Ring
from lme_parallel.context.setup import check_context_parallel
from lme_parallel.equality import make_args
from lme_parallel.tensor.collectives import Group
from lme_parallel.tiny import TinyModel
from lme_parallel.topology import Topology

SETTINGS = {
    "context_parallel_world_size": 2,
    "context_parallel_load_balancing_method": "headtail",
}


def check(model):
    args = make_args(SETTINGS)
    return check_context_parallel(model, Topology.from_args(args, 2, 1), args)


def test_the_layout_is_that_of_the_settings():
    assert check(TinyModel()) == Layout(2, 1, True)


def test_a_layer_that_nobody_can_serve_is_named():
    model = TinyModel()
    model.blocks["1"] = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"does not work with block 1, Linear: none of its"):
        check(model)


def test_dropped_attention_weights_are_refused():
    model = TinyModel()
    model.blocks["0"].sequence_mixer.config = SimpleNamespace(softmax_dropout=0.2)
    with pytest.raises(ValueError, match=r"`softmax_dropout: 0\.2` of block 0 does not work with"):
        check(model)


class Recurrence(nn.Module):
    def forward(self, x, context, cache):
        return x


def test_a_cache_is_refused():
    mixer = Recurrence()
    # Nobody is spoken to: no process group is needed.
    group, ring = Group("none", 2, 0), Ring(None, 2, 0)
    cut_recurrence(mixer, Layout(2, 0, False), group, ring, uncompiled=lambda function: function)
    with pytest.raises(ValueError, match="has no caches for generation"):
        mixer(torch.zeros(1, 2, 3), SimpleNamespace(cu_seqlens=None), object())

"""What does not fit is named before any process is spoken to."""

import pytest
import torch
from torch import nn

from lme_parallel.equality import make_args
from lme_parallel.expert.plan import expert_parameters, read_layers
from lme_parallel.parallelize import parallelize
from lme_parallel.tiny import TinyModel
from lme_parallel.topology import Topology


def prepare(model, **settings):
    """As on the first of four processes, none of which is there."""
    args = make_args({"expert_parallel_world_size": 4, **settings})
    return parallelize(
        model,
        Topology.from_args(args, 4, 0),
        args,
        device=torch.device("cpu"),
        dtype=torch.float32,
        initial_value=None,
    )


def test_the_parameters_by_experts_are_found():
    (first, second) = read_layers(TinyModel(experts=4), 2)
    assert (first.path, first.experts, first.common) == ("blocks.0.mlp", 4, ())
    names = [
        f"blocks.{layer}.mlp.experts.{each}"
        for layer in (0, 1)
        for each in ("gate_up.weight", "gate_up.bias", "down.weight", "down.bias")
    ]
    assert [*first.parameters, *second.parameters] == names
    assert list(expert_parameters(TinyModel(experts=4))) == names


def test_experts_that_do_not_divide_are_named():
    expected = (
        r"`num_experts` of `blocks.0.mlp` must be a multiple of `expert_parallel_world_size` "
        r"\(4\), got 6; change"
    )
    with pytest.raises(ValueError, match=expected):
        prepare(TinyModel(experts=6))


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match=r"`expert_parallel_world_size: 4` needs .* use .*: 1`"):
        prepare(TinyModel())


def test_flat_parameters_are_refused():
    with pytest.raises(ValueError, match=r"size: 4` does not work with `fsdp_algorithm: 1`.* 2`"):
        prepare(TinyModel(experts=4), fsdp_algorithm=1)


def test_experts_whose_tokens_cannot_be_sent_are_refused():
    model = TinyModel(experts=4)
    del model.blocks["1"].mlp.combine
    with pytest.raises(ValueError, match=r"Experts \(`blocks.1.mlp.experts`\): no module above"):
        prepare(model)


def test_what_experts_share_is_refused_where_it_cannot_be_placed():
    model = TinyModel(experts=4)
    model.blocks["0"].mlp.experts.slope = nn.PReLU()
    with pytest.raises(ValueError, match=r"`blocks.0.mlp.experts.slope.weight`; use another `act"):
        prepare(model)


def test_parameters_with_other_numbers_of_experts_are_refused():
    model = TinyModel(experts=4)
    model.blocks["0"].mlp.experts.down.bias = nn.Parameter(torch.zeros(8, 3))
    with pytest.raises(ValueError, match=r"`blocks.0.mlp.experts`\) have \[4, 8\]"):
        prepare(model)

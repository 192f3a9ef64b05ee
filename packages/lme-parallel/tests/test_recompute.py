import logging
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lme_parallel.args import DistributedArgs, GradientCheckpointingArgs
from lme_parallel.compile import apply_compile
from lme_parallel.recompute import apply_recompute, layers_to_recompute


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x, *, scale, cache=None):
        self.calls += 1
        return x + self.dropout(torch.tanh(self.linear(x))) * scale, x.square().sum()


def make_blocks(num_layers=4):
    torch.manual_seed(0)
    return nn.ModuleDict({str(index): Block() for index in range(num_layers)})


def gradients(blocks):
    """Run forward and backward; return every gradient."""
    torch.manual_seed(1)
    x = torch.linspace(-1, 1, 32).view(4, 8).requires_grad_()
    y, auxiliary = x, torch.zeros(())
    for block in blocks.values():
        y, more = block(y, scale=0.5)
        auxiliary = auxiliary + more
    (y.square().sum() + 0.1 * auxiliary).backward()
    return {"x": x.grad, **{name: each.grad for name, each in blocks.named_parameters()}}


def args(method, **values):
    return DistributedArgs(
        gradient_checkpointing_method=method,
        gradient_checkpointing_args=GradientCheckpointingArgs(**values),
    )


CHOICES = {
    "none": (args(None), ()),
    "block": (args("block"), (0, 1, 2, 3)),
    "full": (args("full"), (0, 1, 2, 3)),
    "every second": (args("block", checkpoint_every_n_layers=2), (0, 2)),
    "every third": (args("block", checkpoint_every_n_layers=3), (0, 3)),
    "the first two": (args("block", num_blocks=2), (0, 1)),
    "every second of three": (
        args("block", num_blocks=3, checkpoint_every_n_layers=2),
        (0, 2),
    ),
    "full leaves choices aside": (args("full", checkpoint_every_n_layers=2), (0, 1, 2, 3)),
    "reentrant": (args("block", use_reentrant=True), (0, 1, 2, 3)),
}


@pytest.mark.parametrize(("chosen", "expected"), CHOICES.values(), ids=CHOICES.keys())
def test_gradients_are_bit_equal_and_only_the_chosen_layers_run_twice(chosen, expected):
    plain, recomputed = make_blocks(), make_blocks()
    apply_recompute(recomputed, chosen)
    assert list(recomputed.state_dict()) == list(plain.state_dict())
    left, right = gradients(plain), gradients(recomputed)
    for name, gradient in left.items():
        assert torch.equal(gradient, right[name]), name
    # The second run of a chosen layer is the recomputation; dropout drew the same mask in it.
    assert tuple(int(key) for key, each in recomputed.items() if each.calls == 2) == expected
    assert layers_to_recompute(chosen, 4) == expected


class Stream(NamedTuple):
    x: torch.Tensor
    carried: tuple[torch.Tensor, ...] = ()


class NestedBlock(nn.Module):
    """Takes and gives tensors inside tuples and mappings."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, stream, scale):
        y = torch.tanh(self.linear(stream.x)) * scale
        carried = (stream.carried[0] + y,) if stream.carried else (y,)
        return Stream(stream.x + carried[0], carried), {"loss": y.square().sum()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_tensors_inside_tuples_and_mappings_keep_their_gradients(reentrant):
    gradients = []
    for recomputes in (False, True):
        torch.manual_seed(0)
        blocks = nn.ModuleDict({"0": NestedBlock(), "1": NestedBlock(), "2": NestedBlock()})
        if recomputes:
            apply_recompute(blocks, args("full", use_reentrant=reentrant))
        x = torch.linspace(-1, 1, 32).view(4, 8).requires_grad_()
        stream, total = Stream(x), torch.zeros(())
        for block in blocks.values():
            stream, losses = block(stream, 0.5)
            total = total + losses["loss"]
        (stream.x.square().sum() + 0.1 * total).backward()
        gradients.append([x.grad, *(each.grad for each in blocks.parameters())])
    for got, expected in zip(*gradients, strict=True):
        assert torch.equal(got, expected)


def test_memory_between_forward_and_backward_is_less():
    def saved_bytes(blocks):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        x = torch.randn(64, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for block in blocks.values():
                x, _ = block(x, scale=1.0)
        return total

    recomputed = make_blocks()
    apply_recompute(recomputed, args("block"))
    # Non-reentrant checkpoints hold a block's input only, outside of the hooks.
    assert saved_bytes(recomputed) < saved_bytes(make_blocks()) / 4


def test_without_gradients_nothing_runs_twice():
    blocks = make_blocks()
    apply_recompute(blocks, args("block"))
    with torch.no_grad():
        blocks["0"](torch.zeros(1, 8), scale=1.0)
    assert blocks["0"].calls == 1


def test_a_stage_recomputes_by_global_layer():
    stage = nn.ModuleDict({key: each for key, each in make_blocks().items() if key in "13"})
    apply_recompute(stage, args("block", checkpoint_every_n_layers=3))
    gradients(stage)
    assert [each.calls for each in stage.values()] == [1, 2]


def test_more_blocks_than_layers_is_an_error():
    with pytest.raises(
        ValueError, match=r"`gradient_checkpointing_args\.num_blocks`.*4 layers, got 5"
    ):
        apply_recompute(make_blocks(), args("block", num_blocks=5))


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (args("block", block_name="Block"), "`gradient_checkpointing_args.block_name` has no"),
        (args("full", num_blocks=2), "no effect with `gradient_checkpointing_method: full`"),
        (args(None, num_blocks=2), "no effect without `gradient_checkpointing_method`"),
    ],
)
def test_settings_without_effect_are_named_once(chosen, words, caplog):
    with caplog.at_level(logging.WARNING):
        apply_recompute(make_blocks(), chosen)
    assert [words in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recomputed"])
def test_compiled_blocks_compute_the_same_under_the_same_names(recompute):
    plain, compiled = make_blocks(2), make_blocks(2)
    for block in (*plain.values(), *compiled.values()):
        # Compiled code draws dropout masks in another order.
        block.dropout.p = 0.0
    if recompute:
        apply_recompute(compiled, args("block"))
    apply_compile(compiled.values(), backend="aot_eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    left, right = gradients(plain), gradients(compiled)
    for name, gradient in left.items():
        # Ten roundings of fp32: decompositions may order sums anew.
        torch.testing.assert_close(gradient, right[name], rtol=10 * 2**-23, atol=1e-6)

import logging
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lme_parallel.args import DistributedArgs, GradientCheckpointingArgs
from lme_parallel.compile import apply_compile
from lme_parallel.recompute import apply_recompute, layers_to_recompute
from lme_parallel.saved_ops import DEFAULT, OPS


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
    "selective": (args("selective"), (0, 1, 2, 3)),
    "selective, every third": (args("selective", checkpoint_every_n_layers=3), (0, 3)),
    "selective, the first two": (args("selective", num_blocks=2), (0, 1)),
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
        (args("block", save_ops=("linear",)), "save_ops` has no effect without"),
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


class Mixing(nn.Module):
    """Attention between projections, and functions that are quick to compute again."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48, bias=False)
        self.output = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x, *, scale):
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).unbind(-3)
        heads = (each.transpose(-2, -3) for each in (query, key, value))
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(-2, -3).flatten(-2)
        # A product of activations, twelve to a token.
        weights = torch.softmax(x[..., :12] @ x[..., :12].mT, dim=-1)
        return x + torch.tanh(self.output(mixed).sigmoid() * scale) + weights @ x, x.square().sum()


def mixing(method, **values):
    torch.manual_seed(0)
    blocks = nn.ModuleDict({str(index): Mixing() for index in range(2)})
    apply_recompute(blocks, args(method, **values))
    return blocks


def through(blocks):
    x = torch.linspace(-1, 1, 4 * 32 * 16).view(4, 32, 16).requires_grad_()
    y, total = x, torch.zeros(())
    for block in blocks.values():
        y, more = block(y, scale=0.5)
        total = total + more
    return x, y.square().sum() + 0.1 * total


class Count(TorchDispatchMode):
    """Counts calls of ops that really run."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


# Of each block: two projections, one attention, two products of activations.
FORWARD = {
    "aten::mm": 1,
    "aten::addmm": 1,
    "aten::_scaled_dot_product_flash_attention_for_cpu": 1,
    "aten::bmm": 2,
}
KEPT = {
    "attention": {"aten::_scaled_dot_product_flash_attention_for_cpu"},
    "linear": {"aten::mm", "aten::addmm"},
    "matmul": {"aten::mm", "aten::addmm", "aten::bmm"},
    "communication": set(),
}


@pytest.mark.parametrize("names", [(), *((name,) for name in OPS), ("attention", "matmul"), None])
def test_only_what_is_not_kept_runs_again_and_gradients_are_equal_to_the_bit(names):
    plain, selective = mixing(None), mixing("selective", save_ops=names)
    results, again = [], []
    for blocks in (plain, selective):
        x, loss = through(blocks)
        with Count() as count:
            loss.backward()
        results.append([x.grad, *(each.grad for each in blocks.parameters())])
        again.append(count.calls)
    for got, expected in zip(*reversed(results), strict=True):
        assert torch.equal(got, expected)
    kept = set[str]().union(*(KEPT[name] for name in DEFAULT if names is None))
    kept |= set[str]().union(*(KEPT[name] for name in names or ()))
    for op, calls in FORWARD.items():
        more = again[1][op] - again[0][op]
        assert more == (0 if op in kept else 2 * calls), op


def live_bytes(blocks):
    """Bytes that a forward pass leaves allocated for the backward pass."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = through(blocks)
    events = profiler.profiler.kineto_results.events()
    del kept
    return sum(each.nbytes() for each in events if each.name() == "[memory]")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_is_kept_is_less_than_everything_and_more_than_nothing(compiled):
    sizes = []
    for method, names in (
        ("block", None),
        ("selective", ("attention",)),
        ("selective", ("attention", "linear")),
        (None, None),
    ):
        blocks = mixing(method, save_ops=names)
        if compiled:
            apply_compile(blocks.values(), backend="aot_eager")
            through(blocks)
        sizes.append(live_bytes(blocks))
    assert sizes == sorted(set(sizes))
    # A block of 128 tokens and 16 channels of 4 bytes: attention keeps the outputs and a number
    # for each of 2 heads, projections keep 48 and 16 channels.
    outputs, heads, projections = (2 * 128 * 4 * each for each in (16, 2, 64))
    if not compiled:
        assert sizes[1] - sizes[0] == pytest.approx(outputs + heads, rel=0.01)
        assert sizes[2] - sizes[1] == pytest.approx(projections, rel=0.01)


def test_compiled_blocks_that_keep_results_compute_the_same():
    results = []
    for method in (None, "selective"):
        blocks = mixing(method)
        if method is not None:
            apply_compile(blocks.values(), backend="aot_eager")
        x, loss = through(blocks)
        loss.backward()
        results.append([x.grad, *(each.grad for each in blocks.parameters())])
    for got, expected in zip(*results, strict=True):
        # Ten roundings of fp32: decompositions may order sums anew.
        torch.testing.assert_close(got, expected, rtol=10 * 2**-23, atol=1e-5)


def test_the_reentrant_implementation_keeps_no_results():
    with pytest.raises(ValueError, match=r"`use_reentrant: true` does not work with .*selective"):
        args("selective", use_reentrant=True)

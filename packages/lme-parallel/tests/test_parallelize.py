from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import nn

from lme_parallel.args import DistributedArgs
from lme_parallel.gradients import global_norm
from lme_parallel.parallelize import parallelize
from lme_parallel.topology import Topology

VOCABULARY, HIDDEN = 11, 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("seen", torch.zeros(HIDDEN))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x):
        return x + torch.tanh(self.linear(x)) * 0.5


class Model(nn.Module):
    """Embedding and head are one parameter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleDict({"0": Block(), "1": Block()})
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks.values():
            x = block(x)
        return self.head(x)


@dataclass
class Term:
    total: torch.Tensor
    per: str
    weight: float


@dataclass
class Sums:
    total: torch.Tensor
    targets: torch.Tensor
    extras: dict = field(default_factory=dict)


class Objective:
    """Cross entropy, a term per sequence, and one that is only logged and infinite."""

    def counts(self, batch):
        labels = batch["labels"]
        return {
            "targets": (labels >= 0).sum(),
            "sequences": torch.tensor(labels.shape[0]),
        }

    def forward(self, model, batch):
        return model(batch["input_ids"])

    def loss(self, logits, batch):
        labels = batch["labels"]
        total = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        size = logits.float().square().mean(dim=(1, 2)).sum()
        extras = {
            "size": Term(size, "sequences", 0.25),
            "logged": Term(total * float("inf"), "targets", 0.0),
        }
        return Sums(total, (labels >= 0).sum(), extras)


class Masters:
    def __init__(self, model, dtype):
        self.pairs = {}
        for name, each in model.named_parameters():
            self.pairs[name] = (nn.Parameter(each.detach().clone()), each)
            each.data = each.data.to(dtype)

    def named_parameters(self):
        return {name: master for name, (master, _) in self.pairs.items()}

    def collect_gradients(self):
        for master, copy in self.pairs.values():
            grad = copy.grad.float()
            master.grad = grad if master.grad is None else master.grad + grad
            copy.grad = None

    def refresh(self):
        for master, copy in self.pairs.values():
            copy.data.copy_(master.data)


class Scaler:
    def __init__(self, factor=1024.0):
        self.factor = factor
        self.overflows = []

    def scale(self, loss):
        return loss * self.factor

    def inverse(self):
        return torch.tensor(1 / self.factor)

    def update(self, found_inf):
        self.overflows.append(bool(found_inf))

    def state_dict(self):
        return {"scale": self.factor}

    def load_state_dict(self, state):
        self.factor = state["scale"]


def initial_value(name, region, *, asked=None):
    assert region is None
    if asked is not None:
        asked.append(name)
    shape = dict(Model().named_parameters()) | dict(Model().named_buffers())
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape[name].shape, generator=generator) * 0.3


def single(args=None, *, dtype=torch.float32, **options):
    with torch.device("meta"):
        model = Model()
    args = DistributedArgs() if args is None else args
    topology = Topology.from_args(args, 1, 0)
    options = {"initial_value": initial_value, **options}
    return parallelize(model, topology, args, device=torch.device("cpu"), dtype=dtype, **options)


def reference(dtype=torch.float32):
    """The same model by hand."""
    model = Model()
    with torch.no_grad():
        for name, each in model.named_parameters():
            each.copy_(initial_value(name, None))
    return model.to(dtype)


def batches():
    """Three micro batches with 9, 0 and 2 targets."""
    torch.manual_seed(3)
    made = []
    for count in (9, 0, 2):
        labels = torch.full((12,), -100)
        labels[:count] = torch.randint(VOCABULARY, (count,))
        ids = torch.randint(VOCABULARY, (3, 4))
        made.append({"input_ids": ids, "labels": labels.view(3, 4)})
    return made


def whole_loss(model):
    """The loss of all micro batches as one batch, by its definition."""
    ids = torch.cat([each["input_ids"] for each in batches()])
    labels = torch.cat([each["labels"] for each in batches()])
    logits = model(ids)
    chosen = labels >= 0
    lm_loss = nn.functional.cross_entropy(logits[chosen], labels[chosen])
    size = logits.square().mean()
    return lm_loss + 0.25 * size, lm_loss, size


def test_gradients_are_those_of_one_batch_however_it_is_cut():
    model = reference()
    loss, lm_loss, size = whole_loss(model)
    loss.backward()
    runtime = single()
    sums = runtime.forward_backward(Objective(), batches())
    # A few roundings of fp32, in another order.
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-7)
    close(sums.loss, loss.detach())
    close(sums.values["lm_loss"], lm_loss.detach())
    close(sums.values["size"], size.detach())
    assert sums.targets.item() == 11
    expected = dict(model.named_parameters())
    assert runtime.named_parameters().keys() == expected.keys()
    for name, each in runtime.named_parameters().items():
        close(each.grad, expected[name].grad)


def test_a_second_step_starts_from_no_gradient():
    runtime = single()
    runtime.forward_backward(Objective(), batches())
    first = {name: each.grad.clone() for name, each in runtime.named_parameters().items()}
    runtime.forward_backward(Objective(), batches())
    for name, each in runtime.named_parameters().items():
        assert torch.equal(each.grad, first[name])


def test_a_step_without_targets_has_a_loss_of_zero_not_of_nan():
    runtime = single()
    empty = [batches()[1]]
    sums = runtime.forward_backward(Objective(), empty)
    assert sums.values["lm_loss"].item() == 0.0
    assert all(torch.isfinite(each.grad).all() for each in runtime.named_parameters().values())


def test_a_step_without_batches_is_refused():
    with pytest.raises(ValueError, match="at least one micro batch"):
        single().forward_backward(Objective(), [])


def test_bf16_computes_in_bf16_and_sums_gradients_in_fp32():
    model = reference(torch.bfloat16)
    expected = None
    counts = {"targets": 11, "sequences": 9}
    for batch in batches():
        sums = Objective().loss(model(batch["input_ids"]), batch)
        term = sums.extras["size"]
        (sums.total / counts["targets"] + 0.25 * term.total / counts["sequences"]).backward()
        grads = [each.grad.float() for each in model.parameters()]
        expected = (
            grads if expected is None else [a + b for a, b in zip(expected, grads, strict=True)]
        )
        model.zero_grad()
    runtime = single(dtype=torch.bfloat16, masters=Masters)
    runtime.forward_backward(Objective(), batches())
    for each, grad in zip(runtime.named_parameters().values(), expected, strict=True):
        assert each.dtype == each.grad.dtype == torch.float32
        assert torch.equal(each.grad, grad)
    assert {each.dtype for each in runtime.model.parameters()} == {torch.bfloat16}
    # The copies follow the masters only when the step is finished.
    name = "blocks.0.linear.bias"
    with torch.no_grad():
        runtime.named_parameters()[name].fill_(2.0)
    assert runtime.model.get_parameter(name)[0] != 2.0
    runtime.finish_step()
    assert torch.equal(runtime.model.get_parameter(name), torch.full((HIDDEN,), 2.0).bfloat16())
    assert all(each.grad is None for each in runtime.named_parameters().values())


def test_fp16_gradients_are_unscaled_before_they_are_clipped():
    scaler = Scaler()
    runtime = single(dtype=torch.float16, masters=Masters, scaler=scaler)
    runtime.forward_backward(Objective(), batches())
    norm = runtime.clip_gradients(0.01)
    plain = single()
    plain.forward_backward(Objective(), batches())
    expected = plain.clip_gradients(0.01)
    # fp16 has 11 bits; a dozen of its roundings.
    torch.testing.assert_close(norm, expected, rtol=12 * 2**-11, atol=0)
    clipped = global_norm([each.grad for each in runtime.named_parameters().values()])
    torch.testing.assert_close(clipped, torch.tensor(0.01), rtol=1e-3, atol=0)
    assert scaler.overflows == [False]
    assert runtime.state_dict() == {"loss_scale": {"scale": 1024.0}}
    runtime.load_state_dict({"loss_scale": {"scale": 2.0}})
    assert scaler.factor == 2.0


def test_an_overflow_shows_in_the_norm_and_lowers_the_scale():
    scaler = Scaler(factor=1e30)
    runtime = single(dtype=torch.float16, masters=Masters, scaler=scaler)
    runtime.forward_backward(Objective(), batches())
    assert not torch.isfinite(runtime.clip_gradients(1.0))
    assert scaler.overflows == [True]


@pytest.mark.parametrize("max_norm", [None, 1e-3, 1e3], ids=["measure", "clip", "leave"])
def test_clipping_is_that_of_torch(max_norm):
    runtime, model = single(), reference()
    runtime.forward_backward(Objective(), batches())
    whole_loss(model)[0].backward()
    bound = float("inf") if max_norm is None else max_norm
    expected = nn.utils.clip_grad_norm_(model.parameters(), bound)
    torch.testing.assert_close(runtime.clip_gradients(max_norm), expected)
    for name, each in runtime.named_parameters().items():
        torch.testing.assert_close(each.grad, model.get_parameter(name).grad)


def test_the_norm_of_millions_of_elements_is_exact():
    # A running sum in fp32 is off in the fourth digit here.
    torch.manual_seed(0)
    gradients = [torch.randn(3_000_001), torch.randn(5), torch.randn(4096, 100)]
    expected = torch.cat([each.flatten().double() for each in gradients]).norm()
    torch.testing.assert_close(global_norm(gradients).double(), expected, rtol=2**-22, atol=0)
    assert global_norm([]).item() == 0.0


def test_evaluation_keeps_no_graph_and_leaves_the_mode():
    runtime = single()
    runtime.model.train()
    modes = []
    runtime.model.blocks["0"].register_forward_hook(
        lambda module, *rest: modes.append(module.training)
    )
    batch = batches()[0]
    sums = runtime.forward(Objective(), batch)
    assert not sums.total.requires_grad
    assert modes == [False]
    assert runtime.model.training
    expected = Objective().loss(reference()(batch["input_ids"]), batch).total
    torch.testing.assert_close(sums.total, expected.detach())


def test_one_process_reduces_nothing():
    runtime = single()
    assert runtime.reduce(torch.tensor(3.0), "sum").item() == 3.0
    with pytest.raises(ValueError, match="`op` must be `sum` or `max`, got 'mean'"):
        runtime.reduce(torch.tensor(3.0), "mean")


def test_a_model_on_meta_gets_each_value_once_and_stays_tied():
    asked = []
    runtime = single(initial_value=partial(initial_value, asked=asked))
    model = runtime.model
    assert model.head.weight is model.embedding.weight
    assert sorted(asked) == sorted(set(asked))
    assert "head.weight" not in asked
    for name, each in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(each, initial_value(name, None)), name
    assert set(runtime.named_buffers()) == {"blocks.0.seen", "blocks.1.seen"}


def test_a_model_with_values_keeps_them():
    model = reference()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    args = DistributedArgs()
    runtime = parallelize(
        model,
        Topology.from_args(args, 1, 0),
        args,
        device=torch.device("cpu"),
        dtype=torch.float32,
        initial_value=lambda name, region: pytest.fail("nothing is missing"),
    )
    for name, each in runtime.named_parameters().items():
        assert torch.equal(each, before[name])


def test_frozen_parameters_are_saved_and_get_no_gradient():
    model = reference()
    model.blocks["0"].linear.bias.requires_grad_(False)
    args = DistributedArgs()
    runtime = parallelize(
        model,
        Topology.from_args(args, 1, 0),
        args,
        device=torch.device("cpu"),
        dtype=torch.float32,
        initial_value=initial_value,
    )
    runtime.forward_backward(Objective(), batches())
    found = {name: each.grad is None for name, each in runtime.named_parameters().items()}
    assert found.pop("blocks.0.linear.bias")
    assert not any(found.values())


@pytest.mark.parametrize("method", ["block", "full"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_recomputing_and_compiling_leave_gradients_and_names(method, compiled):
    args = DistributedArgs(gradient_checkpointing_method=method, torch_compile=compiled)
    runtime, plain = single(args, compile_backend="aot_eager"), single()
    left = runtime.forward_backward(Objective(), batches())
    right = plain.forward_backward(Objective(), batches())
    # Without compilation the same operations run in the same order.
    close = {"rtol": 1e-5, "atol": 1e-7} if compiled else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(left.loss, right.loss, **close)
    for name, each in runtime.named_parameters().items():
        torch.testing.assert_close(each.grad, plain.named_parameters()[name].grad, **close)
    assert runtime.named_parameters().keys() == plain.named_parameters().keys()


def test_a_model_that_cannot_be_cut_into_stages_is_named():
    args = DistributedArgs(
        pipeline_parallel_world_size=2, num_pipeline_stages=2, pipeline_parallel_schedule="1F1B"
    )
    with pytest.raises(ValueError, match=r"`part_ends` and `forward_part`; Model lacks them"):
        parallelize(
            Model(),
            Topology.from_args(args, 2, 0),
            args,
            device=torch.device("cpu"),
            dtype=torch.float32,
            initial_value=initial_value,
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": torch.bfloat16}, "needs `masters`"),
        ({"dtype": torch.float16, "masters": Masters}, "needs a `scaler`"),
        ({"initial_value": lambda name, region: torch.zeros(1)}, "must have shape"),
    ],
)
def test_what_is_missing_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        single(**options)


def test_a_model_without_blocks_is_named():
    args = DistributedArgs()
    with pytest.raises(ValueError, match=r"`blocks`.*Linear has none"):
        parallelize(
            nn.Linear(2, 2),
            Topology.from_args(args, 1, 0),
            args,
            device=torch.device("cpu"),
            dtype=torch.float32,
            initial_value=initial_value,
        )

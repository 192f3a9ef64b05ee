from dataclasses import replace

import pytest
import torch

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.layers.activation import ACTIVATIONS
from lme_core.layers.context import SequenceContext
from lme_core.layers.dropout import dropout
from lme_core.mixers.softmax_attention import SoftmaxAttentionConfig
from lme_core.mlps.dense import DenseMLPConfig
from lme_core.mlps.moe import Dispatched, MoEConfig
from lme_kernels.policy import KernelPolicy

H, E, WIDTH = 12, 6, 10


def build(dtype=torch.float64, kernels=None, **fields):
    """A mixture whose parameters and biases are all of order one, so that all of them matter."""
    fields = {"num_experts": E, "intermediate_size": WIDTH} | fields
    config = MoEConfig(**fields)
    moe = config.build(
        GPTBaseConfig(hidden_size=H, position_embedding_type="nope"), 0, kernels or KernelPolicy()
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*moe.parameters(), *moe.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)
    return moe.to(dtype)


def tokens(*shape, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, H, generator=generator, dtype=dtype).requires_grad_()


def dense_expert(moe, expert, x):
    """One expert as the dense MLP it is."""
    c = moe.config
    mlp = DenseMLPConfig(
        intermediate_size=WIDTH, activation_function=c.activation_function, add_bias=c.add_bias
    ).build(GPTBaseConfig(hidden_size=H, position_embedding_type="nope"), 0, KernelPolicy())
    values = {}
    for name, parameter in moe.experts.named_parameters():
        values[name] = parameter if name.startswith("activation") else parameter[expert]
    return torch.func.functional_call(mlp, values, (x, SequenceContext()))[0]


def by_token(moe, x):
    """The whole layer by its definition, token by token in python."""
    c, names = moe.config, dict(moe.named_parameters())
    rows = []
    for token in x.flatten(0, 1):
        logits = names["router.weight"] @ token
        scores = logits.softmax(0) if c.router_score_function == "softmax" else logits.sigmoid()
        rank = scores.detach().clone()
        if c.expert_bias_update_rate is not None:
            rank += moe.router.selection_bias
        if c.num_expert_groups is not None:
            of_groups = rank.view(c.num_expert_groups, -1)
            best = 2 if c.router_score_function == "sigmoid" else 1
            goodness = of_groups.topk(best, dim=-1).values.sum(-1)
            kept = goodness.topk(c.num_groups_per_tok).indices
            closed = torch.ones(c.num_expert_groups, dtype=torch.bool)
            closed[kept] = False
            rank = of_groups.masked_fill(closed[:, None], -1e9).flatten()
        chosen = rank.topk(c.num_experts_per_tok).indices
        weights = scores[chosen]
        if c.normalized_topk:
            weights = weights / weights.sum()
        row = 0.0
        for weight, expert in zip(weights, chosen, strict=True):
            row = row + c.routed_scaling_factor * weight * dense_expert(moe, int(expert), token)
        if c.shared_intermediate_size is not None:
            shared = moe.shared(token[None, None], SequenceContext())[0][0, 0]
            if c.shared_expert_gating:
                shared = torch.sigmoid(names["shared_gate.weight"] @ token) * shared
            row = row + shared
        rows.append(row)
    return torch.stack(rows).view_as(x)


CASES = {
    "softmax over the chosen": {},
    "softmax over all": {"normalized_topk": False},
    "one expert": {"num_experts_per_tok": 1, "normalized_topk": False},
    "every expert": {"num_experts_per_tok": 6},
    "biases": {"add_bias": True, "activation_function": "swiglu"},
    "gated shared expert": {
        "shared_intermediate_size": 7,
        "shared_expert_gating": True,
        "add_bias": True,
        "activation_function": "swiglu",
    },
    "sigmoid, balanced by biases": {
        "router_score_function": "sigmoid",
        "expert_bias_update_rate": 0.001,
        "routed_scaling_factor": 2.5,
        "shared_intermediate_size": 5,
    },
    "sigmoid, limited to groups": {
        "router_score_function": "sigmoid",
        "expert_bias_update_rate": 0.001,
        "num_expert_groups": 3,
        "num_groups_per_tok": 2,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5,
    },
    "softmax, limited to groups": {
        "num_expert_groups": 2,
        "num_groups_per_tok": 1,
        "normalized_topk": False,
    },
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_match_a_loop_over_tokens(fields):
    moe = build(**fields)
    x = tokens(2, 9)
    ours, _ = moe(x, SequenceContext())
    expected = by_token(moe, x)
    # Rounding in float64 only.
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    grad = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    names, inputs = zip(*[("x", x), *moe.named_parameters()], strict=True)
    got = torch.autograd.grad(ours, inputs, grad)
    its = torch.autograd.grad(expected, inputs, grad, allow_unused=True)
    for name, left, right in zip(names, got, its, strict=True):
        # An expert that no token chose is unused by the loop.
        right = torch.zeros_like(left) if right is None else right
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_experts_have_every_activation_of_a_dense_mlp(name):
    moe = build(activation_function=name, add_bias=True)
    x = tokens(1, 8)
    ours, _ = moe(x, SequenceContext())
    expected = by_token(moe, x)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    inputs = [x, *moe.experts.parameters()]
    for left, right in zip(
        torch.autograd.grad(ours.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


def test_a_shared_name_has_the_shapes_traits_and_active_size_of_the_seed_system():
    config = MoEConfig(
        num_experts=4,
        num_experts_per_tok=2,
        intermediate_size=64,
        shared_intermediate_size=32,
        shared_expert_gating=True,
        activation_function="swiglu",
        add_bias=True,
    )
    mixers = (SoftmaxAttentionConfig(num_attention_heads=4),)
    settings = GPTBaseConfig(hidden_size=32, num_layers=1, sequence_mixer_blocks=mixers)
    moe = config.build(settings, 0, KernelPolicy())
    shapes = {name: tuple(p.shape) for name, p in moe.named_parameters()}
    assert shapes == {
        "router.weight": (4, 32),
        "experts.gate_up.weight": (4, 128, 32),
        "experts.gate_up.bias": (4, 128),
        "experts.down.weight": (4, 32, 64),
        "experts.down.bias": (4, 32),
        "shared.gate_up.weight": (64, 32),
        "shared.gate_up.bias": (64,),
        "shared.down.weight": (32, 32),
        "shared.down.bias": (32,),
        "shared_gate.weight": (1, 32),
    }
    total = sum(p.numel() for p in moe.parameters())
    assert total - config.inactive_parameters(settings) == 15936
    specs = {
        f"{path}.{name}": spec
        for path, module in moe.named_modules()
        if hasattr(module, "parameter_specs")
        for name, spec in module.parameter_specs().items()
    }
    assert {name for name, spec in specs.items() if not spec.weight_decay} == {
        name for name in specs if name.endswith("bias")
    }
    assert {name for name, spec in specs.items() if spec.mup} == {
        name for name in specs if name.endswith("weight") and name != "shared_gate.weight"
    }


# The sum that the seed system gives for these logits: even counts, and a tenth of the z-loss.
def test_the_losses_of_one_sequence_are_the_known_ones():
    moe = build(num_experts=4)
    logits = torch.tensor([[1.0, 0, 0, 2], [0, 3, 1, 0]], dtype=torch.float64)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[:, :2] = logits.t()
    x = torch.eye(2, H, dtype=torch.float64)[None]
    _, auxiliary = moe(x, SequenceContext())
    assert auxiliary.statistics["expert_counts"].tolist() == [1, 1, 1, 1]
    losses = auxiliary.losses
    both = losses["router_aux_loss"] + 0.1 * losses["router_z_loss"]
    # It was computed in float32.
    assert both.item() == pytest.approx(1.82648015, rel=1.2e-7)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_and_statistics_match_their_formula_with_padding(score):
    moe = build(router_score_function=score, num_experts_per_tok=2)
    x = tokens(3, 7)
    lengths = [7, 4, 1]
    valid = torch.arange(7) < torch.tensor(lengths)[:, None]
    _, auxiliary = moe(x, SequenceContext(valid=valid))
    aux, z, entropy, total_counts = 0.0, 0.0, 0.0, torch.zeros(E)
    for row, length in zip(x, lengths, strict=True):
        logits = row[:length] @ moe.router.weight.t()
        p = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        counts = torch.bincount(p.topk(2).indices.flatten(), minlength=E).double()
        p = p / p.sum(-1, keepdim=True)
        aux = aux + E * (counts / counts.sum() * p.mean(0)).sum()
        z = z + logits.exp().sum(-1).log().square().mean()
        entropy = entropy - (p * p.log()).sum()
        total_counts += counts
    losses, statistics = auxiliary
    torch.testing.assert_close(losses["router_aux_loss"], aux, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses["router_z_loss"], z, rtol=1e-12, atol=0)
    assert torch.equal(statistics["expert_counts"], total_counts.float())
    torch.testing.assert_close(statistics["router_entropy"], entropy.detach(), rtol=1e-12, atol=0)
    assert not statistics["router_entropy"].requires_grad
    for name, expected in (("router_aux_loss", aux), ("router_z_loss", z)):
        inputs = (x, moe.router.weight)
        for left, right in zip(
            torch.autograd.grad(losses[name], inputs, retain_graph=True),
            torch.autograd.grad(expected, inputs, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


def test_a_sequence_counts_the_same_in_any_batch():
    moe = build()
    x = tokens(4, 5)
    _, whole = moe(x, SequenceContext())
    parts = [moe(each, SequenceContext())[1] for each in x.split([1, 3])]
    for name, loss in whole.losses.items():
        assert loss.item() == pytest.approx(sum(part.losses[name].item() for part in parts))
    counts = sum(part.statistics["expert_counts"] for part in parts)
    assert torch.equal(whole.statistics["expert_counts"], counts)


# What context parallelism does: each device has a part of every sequence and the sums are shared.
def test_sequences_in_parts_give_the_losses_of_whole_ones():
    moe = build(router_score_function="sigmoid")
    x = tokens(2, 8)
    _, whole = moe(x, SequenceContext())
    parts = x.split([5, 3], dim=1)
    sums = []

    def remember(each):
        sums.append(each)
        return each

    moe.balancer.reduce_counts = remember
    for part in parts:
        moe(part, SequenceContext())
    moe.balancer.reduce_counts = lambda each: sums[0] + sums[1]
    moe.balancer.parts = 2
    shares = [moe(part, SequenceContext())[1].losses for part in parts]
    for name, loss in whole.losses.items():
        for share in shares:
            torch.testing.assert_close(share[name], loss / 2, rtol=1e-12, atol=0)


def test_evaluation_has_no_auxiliary_results():
    moe = build().eval()
    _, auxiliary = moe(tokens(1, 4), SequenceContext())
    assert not auxiliary.losses
    assert not auxiliary.statistics


# What expert parallelism does: tokens go to the device of their expert, one choice each.
def test_experts_may_be_spread_over_devices():
    moe = build(num_experts_per_tok=2, activation_function="swiglu", add_bias=True)
    x = tokens(2, 6)
    expected, _ = moe(x, SequenceContext())
    owners, halves = (slice(0, 3), slice(3, 6)), []
    for owner in owners:
        half = build(num_experts=3, activation_function="swiglu", add_bias=True)
        with torch.no_grad():
            for name, parameter in half.experts.named_parameters():
                parameter.copy_(moe.experts.get_parameter(name)[owner])
        halves.append(half.experts)
    receipts = []

    def dispatch(rows, weights, indices):
        entry = torch.arange(indices.numel())
        outputs = torch.zeros(indices.numel(), H, dtype=rows.dtype)
        for owner, experts in zip(owners, halves, strict=True):
            flat = indices.flatten()
            mine = entry[(flat >= owner.start) & (flat < owner.stop)]
            y = experts(
                rows[mine // 2],
                weights.flatten()[mine][:, None],
                flat[mine][:, None] - owner.start,
            )
            outputs = outputs.index_put((mine,), y)
        receipts.append(outputs)
        nothing = rows[:0]
        return Dispatched(nothing, weights[:0], indices[:0], outputs)

    moe.dispatch = dispatch
    moe.combine = lambda y, receipt: receipt.view(-1, 2, H).sum(1)
    got, _ = moe(x, SequenceContext())
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert len(receipts) == 1


def test_dropout_is_applied_once():
    moe = build(dropout=0.5, shared_intermediate_size=5)
    x = tokens(2, 5)
    index, key = torch.arange(10).view(2, 5), torch.tensor(3)
    plain, _ = moe(x, SequenceContext())
    dropped, _ = moe(x, SequenceContext(dropout_key=key, token_index=index))
    assert torch.equal(dropped, dropout(plain, 0.5, key, 8, index))
    assert not torch.equal(dropped, plain)


def test_biases_choose_but_do_not_weigh_and_stay_float32():
    fields = {"router_score_function": "sigmoid", "expert_bias_update_rate": 0.001}
    moe = build(**fields)
    x = tokens(2, 6)
    with torch.no_grad():
        moe.router.selection_bias.copy_(torch.tensor([9.0, 0, 0, 8, 0, 0]))
    routing = moe.router(x)
    assert set(routing.indices.flatten().tolist()) == {0, 3}
    scores = routing.logits.sigmoid()[..., [0, 3]]
    expected = scores / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(
        routing.weights.sort(-1).values, expected.sort(-1).values, rtol=1e-12, atol=0
    )
    bias = torch.tensor([1.001, 0, 0, 8, 0, 0])
    with torch.no_grad():
        moe.router.selection_bias.copy_(bias)
    low = moe.to(torch.bfloat16)
    assert low.router.weight.dtype == torch.bfloat16
    assert low.router.selection_bias.dtype == torch.float32
    # bfloat16 has no 1.001.
    assert low.router.selection_bias[0] == bias[0]


def test_bfloat16_stays_close_to_float32():
    fields = {"activation_function": "swiglu", "shared_intermediate_size": 8}
    fine, rough = build(torch.float32, **fields), build(torch.bfloat16, **fields)
    with torch.no_grad():
        # The same experts for both, however close two logits are.
        for each in (fine, rough):
            each.router.weight.copy_(rough.router.weight)
    x = tokens(2, 16, dtype=torch.bfloat16)
    y, _ = fine(x.float(), SequenceContext())
    low, _ = rough(x, SequenceContext())
    assert low.dtype == torch.bfloat16
    # Eight bits through two products: measured 0.4 % of the norm.
    assert (low.float() - y).norm() / y.norm() < 0.02


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 7}, r"at most `num_experts` \(6\), got 7"),
        ({"num_experts": 0}, "`num_experts` must be at least 1, got 0"),
        ({"shared_expert_gating": True}, "needs a shared expert"),
        ({"num_expert_groups": 4, "num_groups_per_tok": 1}, r"must divide `num_experts` \(6\)"),
        ({"num_expert_groups": 3}, "must be given together, got 3 and None"),
        ({"num_expert_groups": 3, "num_groups_per_tok": 4}, r"at most `num_expert_groups` \(3\)"),
        (
            {"num_expert_groups": 3, "num_groups_per_tok": 1, "num_experts_per_tok": 3},
            "at most the 2 experts",
        ),
        ({"expert_bias_update_rate": -1.0}, "`expert_bias_update_rate` must be at least 0"),
        ({"routed_scaling_factor": 0.0}, "`routed_scaling_factor` must be above 0"),
        ({"activation_function": "swigly"}, "did you mean `swiglu`"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(MoEConfig(num_experts=E), **fields)


def test_a_setting_of_old_files_says_that_it_has_no_effect(caplog):
    MoEConfig(use_interleaved_weights=True)
    assert "setting without effect: use_interleaved_weights=True" in caplog.text


@pytest.mark.parametrize("activation", ["swiglu", "mish_glu"])
def test_it_compiles_whole(activation):
    torch.compiler.reset()
    moe = build(activation_function=activation, shared_intermediate_size=8)
    x = tokens(2, 6)
    expected, its = moe(x, SequenceContext())
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    got, auxiliary = compiled(x, SequenceContext())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    for name, loss in its.losses.items():
        torch.testing.assert_close(auxiliary.losses[name], loss, rtol=1e-12, atol=0)
    assert torch.equal(auxiliary.statistics["expert_counts"], its.statistics["expert_counts"])
    inputs = [x, *moe.parameters()]
    wanted = torch.autograd.grad(expected.square().sum() + its.losses["router_aux_loss"], inputs)
    loss = got.square().sum() + auxiliary.losses["router_aux_loss"]
    for left, right in zip(torch.autograd.grad(loss, inputs), wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-11)

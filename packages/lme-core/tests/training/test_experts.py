"""Mixtures of experts in the loop: balance, statistics and what they do to a step."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lme_core.architectures.decoder import parameter_traits
from lme_core.architectures.stream import Stream
from lme_core.config import from_dict
from lme_core.layers.auxiliary import Auxiliary
from lme_core.training.batches import BatchStream
from lme_core.training.experts import ExpertBalance, expert_metrics
from lme_core.training.objectives import NextToken
from lme_core.training.optimizer_class_args import AdamWClassArgs
from lme_core.training.optimizers import TorchAdamWArgs, build_optimizer
from lme_core.training.runtime import SingleDevice
from lme_core.training.schedules import LRSchedulerArgs, build_schedule
from lme_core.training.trainer import Trainer, TrainState
from lme_kernels.policy import KernelPolicy

V, E = 128, 8


def configuration(layers=1, router_aux_loss_coef=None, router_z_loss_coef=None, **moe):
    return from_dict(
        {
            "model_type": "gpt_base",
            "vocab_size": V,
            "hidden_size": 32,
            "num_layers": layers,
            "init_method": "fan_in",
            "router_aux_loss_coef": router_aux_loss_coef,
            "router_z_loss_coef": router_z_loss_coef,
            "sequence_mixer_blocks": [{"num_attention_heads": 2, "num_key_value_heads": 1}],
            "mlp_blocks": [
                {
                    "mlp_type": "MoE",
                    "activation_function": "swiglu",
                    "intermediate_size": 8,
                    "num_experts": E,
                    "num_experts_per_tok": 2,
                    **moe,
                }
            ],
        }
    )


class SkewedStream:
    """Sequences in which a token mostly follows from the one before, some far more often."""

    def __init__(self, rows=16, length=64):
        self.rows, self.length, self.position = rows, length, 0

    def __next__(self):
        generator = torch.Generator().manual_seed(self.position)
        shape = (self.rows, self.length + 1)
        frequency = torch.arange(1, V + 1).float().rsqrt()
        drawn = torch.multinomial(
            frequency, self.rows * (self.length + 1), replacement=True, generator=generator
        ).view(shape)
        follows = torch.rand(shape, generator=generator) < 0.5
        for column in range(1, self.length + 1):
            successor = (drawn[:, column - 1] * 3 + 1) % V
            drawn[:, column] = torch.where(follows[:, column], successor, drawn[:, column])
        self.position += 1
        index = torch.arange(self.rows * self.length).view(self.rows, -1)
        return {
            "input_ids": drawn[:, :-1].contiguous(),
            "labels": drawn[:, 1:].contiguous(),
            "token_index": index,
        }

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def train(config, steps, *, dtype=torch.float32, rows=16, accumulation=1):
    """Train; give every step's metrics and load by layer, and the runtime."""
    with torch.device("meta"):
        model = config.build(KernelPolicy())
    runtime = SingleDevice(model, dtype=dtype)
    args = TorchAdamWArgs(class_args=AdamWClassArgs(lr=5e-3))
    optimizer = build_optimizer(args, runtime.named_parameters(), parameter_traits(model))
    schedule = build_schedule(LRSchedulerArgs(num_warmup_steps=5), optimizer, steps)
    metrics, loads = [], []
    balance = ExpertBalance.of(config, runtime.named_buffers())

    def watch(values, finite):
        loads.append(torch.stack([values[f"expert_counts.{i}"] for i in range(config.num_layers)]))
        if balance is not None:
            balance(values, finite)

    Trainer(
        runtime,
        NextToken(config.auxiliary_weights()),
        optimizer,
        schedule,
        BatchStream(SkewedStream(rows), gradient_accumulation_steps=accumulation, device="cpu"),
        [lambda state, report: metrics.append({**report.values, "loss": report.loss})],
        num_training_steps=steps,
        balance=watch,
    ).fit(TrainState())
    return metrics, torch.stack(loads), runtime


def imbalance(loads):
    """Load of the busiest expert over the mean one, over several steps."""
    total = loads.sum(dim=0)
    return (total.max(dim=-1).values / total.mean(dim=-1)).max().item()


BALANCED = {
    "by biases": {"router_score_function": "sigmoid", "expert_bias_update_rate": 0.003},
    "by a loss": {"router_aux_loss_coef": 0.1},
}


@pytest.mark.parametrize("fields", BALANCED.values(), ids=BALANCED.keys())
def test_a_skewed_stream_is_balanced_within_200_steps(fields):
    metrics, loads, _ = train(configuration(**fields), 200)
    assert imbalance(loads[:1]) > 1.9
    # Of 20 steps together: the 1024 tokens of one make 1.1 by chance.
    assert imbalance(loads[-20:]) < 1.1
    assert metrics[-1]["lm_loss"] < 3.3


def test_the_same_stream_stays_skewed_if_nothing_balances_it():
    _, loads, _ = train(configuration(), 60)
    assert imbalance(loads[-20:]) > 1.5


def fixed_model(config):
    """A model in float64 whose weights are large enough that every part matters."""
    with torch.device("meta"):
        model = config.build(KernelPolicy())
    return model.materialize("cpu", torch.float64)


LOSSES = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.02}


def test_micro_batches_count_as_one_batch():
    config = configuration(layers=2, shared_intermediate_size=8, **LOSSES)
    batch = next(SkewedStream(rows=4, length=16))
    parts = [{name: value[rows] for name, value in batch.items()} for rows in ([0], [1, 2, 3])]
    objective = NextToken(config.auxiliary_weights())
    runs = []
    for batches in ([batch], parts):
        runtime = SingleDevice(fixed_model(config), dtype=torch.float64)
        sums = runtime.forward_backward(objective, batches)
        runs.append((sums, {n: p.grad for n, p in runtime.named_parameters().items()}))
    (whole, gradients), (split, of_parts) = runs
    # Rounding in float64, and counts in float32, which hold these exactly.
    torch.testing.assert_close(split.loss, whole.loss, rtol=1e-12, atol=0)
    assert split.values.keys() == whole.values.keys()
    for name, value in whole.values.items():
        torch.testing.assert_close(split.values[name], value, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(of_parts[name], gradient, rtol=1e-9, atol=1e-14)


def test_each_loss_has_its_own_coefficient_and_none_is_needed():
    batch = next(SkewedStream(rows=2, length=16))
    for weights in (LOSSES, {"router_aux_loss_coef": None}, {"router_z_loss_coef": 0.5}):
        config = configuration(layers=2, **weights)
        runtime = SingleDevice(fixed_model(config), dtype=torch.float64)
        sums = runtime.forward_backward(NextToken(config.auxiliary_weights()), [batch])
        values = sums.values
        expected = values["lm_loss"]
        expected = expected + (weights.get("router_aux_loss_coef") or 0) * values["router_aux_loss"]
        expected = expected + (weights.get("router_z_loss_coef") or 0) * values["router_z_loss"]
        torch.testing.assert_close(sums.loss, expected, rtol=1e-12, atol=0)
        # Two layers, and one sequence counts as one: at least 1 each, at most E / 2.
        assert 2 <= values["router_aux_loss"] < E


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_that_runs_again_counts_once(reentrant):
    config = configuration(layers=2, **LOSSES)
    batch = next(SkewedStream(rows=2, length=16))
    objective = NextToken(config.auxiliary_weights())
    runs = []
    for recomputes in (False, True):
        model = fixed_model(config)
        runtime = SingleDevice(model, dtype=torch.float64)
        for block in model.blocks.values():
            if recomputes:
                block.forward = recomputed(block.forward, reentrant)
        sums = runtime.forward_backward(objective, [batch])
        runs.append((sums, runtime.named_parameters()))
    (plain, left), (again, right) = runs
    assert torch.equal(plain.loss, again.loss)
    for name, value in plain.values.items():
        assert torch.equal(again.values[name], value), name
    for name, parameter in left.items():
        torch.testing.assert_close(right[name].grad, parameter.grad, rtol=1e-12, atol=1e-15)


def recomputed(forward, reentrant):
    """Run a block as activation checkpointing does; the reentrant kind sees flat tensors only."""

    def run(stream, context, cache):
        if not reentrant:
            return checkpoint(forward, stream, context, cache, use_reentrant=False)
        names = []

        def flat(x):
            out, auxiliary = forward(Stream(x), context, cache)
            names.append((list(auxiliary.losses), list(auxiliary.statistics)))
            return (out.x, *auxiliary.losses.values(), *auxiliary.statistics.values())

        x, *rest = checkpoint(flat, stream.x, use_reentrant=True)
        losses, statistics = names[0]
        count = len(losses)
        return Stream(x), Auxiliary(
            dict(zip(losses, rest[:count], strict=True)),
            dict(zip(statistics, rest[count:], strict=True)),
        )

    return run


def test_metrics_of_experts():
    values = {
        "lm_loss": torch.tensor(2.0),
        "expert_counts.3": torch.tensor([1.0, 3.0, 0.0, 4.0]) / 7,
        "router_entropy.3": torch.tensor(2.4) / 7,
        "router_tokens.3": torch.tensor(4.0) / 7,
    }
    metrics = {name: round(value.item(), 6) for name, value in expert_metrics(values).items()}
    assert metrics == {
        "lm_loss": 2.0,
        "expert_imbalance.3": 2.0,
        "expert_load_max.3": 0.5,
        "expert_load_min.3": 0.0,
        "router_entropy.3": 0.6,
    }


def test_biases_move_against_the_load_and_only_in_finite_steps():
    bias = torch.zeros(4)
    balance = ExpertBalance({"1": bias}, {"1": 0.5})
    values = {"expert_counts.1": torch.tensor([1.0, 3.0, 0.0, 2.0])}
    balance(values, torch.tensor(False))
    assert bias.tolist() == [0, 0, 0, 0]
    balance(values, torch.tensor(True))
    assert bias.tolist() == [0.5, -0.5, 0.5, -0.5]
    balance({"expert_counts.1": torch.ones(4)}, torch.tensor(True))
    assert bias.tolist() == [0.5, -0.5, 0.5, -0.5]


def test_biases_are_found_saved_and_kept_in_float32():
    config = configuration(layers=2, expert_bias_update_rate=0.001)
    _, loads, runtime = train(config, 3, dtype=torch.bfloat16, rows=2)
    assert list(runtime.named_buffers()) == [
        "blocks.0.mlp.router.selection_bias",
        "blocks.1.mlp.router.selection_bias",
    ]
    for layer, bias in enumerate(runtime.named_buffers().values()):
        steps = torch.sign(loads[:, layer].mean(-1, keepdim=True) - loads[:, layer])
        assert bias.dtype == torch.float32
        torch.testing.assert_close(bias, 0.001 * steps.sum(0), rtol=1e-6, atol=1e-9)


def test_nothing_moves_where_the_rate_is_nothing():
    for rate in (None, 0.0):
        config = configuration(expert_bias_update_rate=rate)
        model = config.build(KernelPolicy())
        assert ExpertBalance.of(config, dict(model.named_buffers())) is None

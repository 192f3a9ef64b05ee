"""Every way of recomputing blocks trains a real model to the same bits, losses of experts too."""

import pytest
import torch

from lme_core.config import from_dict
from lme_core.training.objectives import NextToken
from lme_kernels.policy import KernelPolicy
from lme_parallel.equality import make_args
from lme_parallel.parallelize import parallelize
from lme_parallel.topology import Topology

V, ROWS, LENGTH = 61, 2, 12
MODEL = {
    "model_type": "gpt_base",
    "vocab_size": V,
    "hidden_size": 16,
    "num_layers": 3,
    "position_embedding_type": "rope",
    "initializer_range": 0.3,
    "router_aux_loss_coef": 0.3,
    "router_z_loss_coef": 0.1,
    "sequence_mixer_blocks": [
        {"num_attention_heads": 4, "num_key_value_heads": 2, "softmax_dropout": 0.2},
        {
            "sequence_mixer_type": "mamba2",
            "state_size": 4,
            "intermediate_size": 24,
            "num_heads": 6,
            "num_groups": 2,
        },
        {"num_attention_heads": 4, "num_key_value_heads": 2},
    ],
    "mlp_blocks": [
        {
            "mlp_type": "MoE",
            "activation_function": "swiglu",
            "intermediate_size": 12,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 8,
            "expert_bias_update_rate": 0.01,
            "dropout": 0.2,
        }
    ],
}
WAYS = {
    "block": ("block", {}),
    "full": ("full", {}),
    "every second": ("block", {"checkpoint_every_n_layers": 2}),
    "reentrant": ("block", {"use_reentrant": True}),
    "selective": ("selective", {}),
    "selective, products": ("selective", {"save_ops": ("matmul",)}),
    "selective, nothing kept": ("selective", {"save_ops": ()}),
}


def step(method, settings, **further):
    """Run the micro batches of a step; return losses and gradients."""
    args = make_args(
        {
            "gradient_checkpointing_method": method,
            "gradient_checkpointing_args": settings,
            **further,
        }
    )
    config = from_dict(MODEL)
    with torch.device("meta"):
        model = config.build(KernelPolicy(), seed=3)
    runtime = parallelize(
        model,
        Topology.from_args(args, 1, 0),
        args,
        device=torch.device("cpu"),
        dtype=torch.float32,
        initial_value=model.initial_value,
        compile_backend="aot_eager",
    )
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(2):
        ids, labels = torch.randint(V, (2, ROWS, LENGTH), generator=generator)
        index = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) + number * ROWS * LENGTH
        dropout = {"token_index": index, "dropout_key": torch.tensor(77)}
        batches.append({"input_ids": ids, "labels": labels, **dropout})
    sums = runtime.forward_backward(NextToken(config.auxiliary_weights()), batches)
    gradients = {name: each.grad for name, each in runtime.named_parameters().items()}
    return {"loss": sums.loss, **sums.values}, gradients


@pytest.fixture(scope="module")
def plain():
    return step(None, {})


@pytest.mark.parametrize("way", WAYS)
def test_losses_counts_and_gradients_are_those_without_recomputation_to_the_bit(way, plain):
    losses, gradients = step(*WAYS[way])
    assert losses.keys() == plain[0].keys()
    for name, expected in plain[0].items():
        assert torch.equal(losses[name], expected), name
    for name, expected in plain[1].items():
        assert torch.equal(gradients[name], expected), name


def test_each_token_is_counted_once_at_each_of_its_two_experts(plain):
    for layer in range(MODEL["num_layers"]):
        # Of a sequence, on average.
        assert plain[0][f"expert_counts.{layer}"].sum() == 2 * LENGTH

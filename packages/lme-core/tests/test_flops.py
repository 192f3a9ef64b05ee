import time
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lme_core.config import from_dict
from lme_core.flops import count_parameters, device_peak_flops, flops_per_token
from lme_core.training.throughput import Throughput
from lme_kernels.policy import KernelArgs, KernelPolicy

BASE = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2}
CASES = {
    "grouped, gated": (
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"activation_function": "swiglu", "intermediate_size": 48},
        {},
    ),
    "multi-query, not gated, tied": (
        {"num_attention_heads": 4, "num_key_value_heads": 1},
        {"activation_function": "gelu", "intermediate_size": 40},
        {"tie_word_embeddings": True},
    ),
    "wide heads, gate, biases": (
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "attention_gate": True,
            "add_bias": True,
        },
        {"activation_function": "geglu", "add_bias": True},
        {"position_embedding_type": "learned_absolute", "normalization_function": "layernorm"},
    ),
    "experts, a gated shared one": (
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {
            "mlp_type": "MoE",
            "activation_function": "swiglu",
            "intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
            "shared_expert_gating": True,
        },
        {},
    ),
    "side by side": (
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"activation_function": "swiglu", "intermediate_size": 48},
        {"model_type": "palm"},
    ),
    "ladder": (
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"activation_function": "swiglu", "intermediate_size": 48},
        {"model_type": "ladder_residual"},
    ),
    "shared keys": (
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"activation_function": "swiglu", "intermediate_size": 48},
        {"model_type": "gpt_crosslayer", "sharing_pattern": [0, 0]},
    ),
}


def measured(config, S):
    """Training FLOPs of one token by torch's counter: of attention, and of the rest."""
    # Explicit attention, whose products the counter sees one by one, over all pairs of tokens.
    model = config.build(KernelPolicy.from_args(KernelArgs(kernels=[])))
    # Without the loss, whose products the counter could not see in an op of our own.
    ids = torch.zeros(1, S, dtype=torch.int64)
    x = model.embed({"input_ids": ids})
    with FlopCounterMode(display=False) as counter:
        model.head(
            model.run_blocks(x, model.context({"input_ids": ids}))[0]
        ).logits.sum().backward()
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for op, flops in counts.items() if "bmm" in op)
    return attention / S, (sum(counts.values()) - attention) / S


@pytest.mark.parametrize(("mixer", "mlp", "fields"), CASES.values(), ids=CASES)
def test_linear_layers_count_as_measured_and_causal_attention_at_half(mixer, mlp, fields):
    settings = BASE | {"sequence_mixer_blocks": [mixer], "mlp_blocks": [mlp]} | fields
    config = from_dict(settings)
    S = 64
    attention, linear = measured(config, S)
    # Causality leaves (S + 1) / 2 of S keys: half and one diagonal.
    assert flops_per_token(config, S) == pytest.approx(linear + attention * (S + 1) / (2 * S))


def some_config(random):
    """An architecture, its sizes, its layers and their windows by chance."""
    heads = random.choice([1, 2, 4])
    layers = random.randint(1, 4)

    def attention():
        return {
            "num_attention_heads": 4,
            "num_key_value_heads": heads,
            "sliding_window": random.choice([None, 1, 3, 100]),
            "attention_gate": random.random() < 0.3,
            "qk_norm": random.random() < 0.3,
        }

    def mlp():
        experts = random.randint(1, 6)
        moe = {
            "mlp_type": "MoE",
            "num_experts": experts,
            "num_experts_per_tok": random.randint(1, experts),
            "shared_intermediate_size": random.choice([None, 8]),
        }
        kind = moe if random.random() < 0.5 else {"mlp_type": "MLP"}
        activation = random.choice(["swiglu", "gelu", "relu_glu"])
        return kind | {
            "activation_function": activation,
            "intermediate_size": random.randint(1, 40),
        }

    model_type = random.choice(["gpt_base", "palm", "ladder_residual", "gpt_crosslayer"])
    fields = {}
    if model_type == "gpt_crosslayer":
        fields["sharing_pattern"] = [i // 2 * 2 for i in range(layers)]
    return from_dict(
        {
            "model_type": model_type,
            "vocab_size": random.randint(3, 90),
            "hidden_size": 16,
            "num_layers": layers,
            "tie_word_embeddings": random.random() < 0.5,
            "sequence_mixer_blocks": [attention() for _ in range(layers)],
            "mlp_blocks": [mlp() for _ in range(layers)],
            **fields,
        }
    )


# A device does at least the products that are counted: whatever time it takes for them, the share
# of its peak that a step reports is at most the share it worked at, and never above 1.
@pytest.mark.parametrize("seed", range(40))
def test_no_model_counts_more_than_is_computed(seed):
    random = Random(seed)
    config, S = some_config(random), random.randint(1, 24)
    attention, linear = measured(config, S)
    counted = flops_per_token(config, S)
    assert counted <= (attention + linear) * (1 + 1e-12)
    # And no less than all linear layers.
    assert counted >= linear * (1 - 1e-12)
    throughput = Throughput(
        num_devices=1, flops_per_token=counted, device_peak_flops=(attention + linear) * 1e3
    )
    # 1000 tokens in a second keep a device of that peak busy for all of it.
    report = SimpleNamespace(tokens=1000, started=time.perf_counter() - 1.0, data_wait_seconds=0.0)
    throughput.add(report)
    assert 0 < throughput.read()["mfu"] <= 1


RECURRENT = {
    "mamba2": {"state_size": 16, "intermediate_size": 64, "num_heads": 8, "num_groups": 2},
    "gated_deltanet": {
        "k_head_dim": 8,
        "v_head_dim": 8,
        "num_k_heads": 2,
        "num_v_heads": 4,
        "use_gate": True,
        "allow_neg_eigval": False,
        "kernel_size": 4,
    },
    "m2rnn": {
        "k_head_dim": 8,
        "v_head_dim": 8,
        "num_q_heads": 1,
        "num_k_heads": 1,
        **{f"num_{name}_heads": 4 for name in ("v", "f", "g", "weight")},
        "use_residual": True,
    },
    "rnn": {"state_head_dim": 8, "num_input_heads": 4, "num_weight_heads": 4},
}


# Mixers are counted for what they are: each costs at least its projections, and no more than that
# and a few products of its state.
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_mixers_count_their_projections_and_states(kind):
    block = {"sequence_mixer_type": kind, **RECURRENT[kind]}
    fields = {"sequence_mixer_blocks": [block], "position_embedding_type": "nope"}
    config = from_dict(BASE | fields | {"num_layers": 1})
    model = config.build(KernelPolicy.from_args(KernelArgs(kernels=[])))
    # A single token has no state before it, so every product with a weight is seen, and those
    # with states at most once.
    weights = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)
    )
    counted = flops_per_token(config, 64)
    assert 3 * 2 * weights <= counted < 3 * 2 * weights * 1.5
    assert flops_per_token(config, 128) == counted


def test_active_parameters_leave_out_the_experts_not_chosen():
    moe = {
        "mlp_type": "MoE",
        "activation_function": "swiglu",
        "intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "add_bias": True,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    dense = {"mlp_type": "MLP", "activation_function": "gelu", "intermediate_size": 4}
    blocks = {"sequence_mixer_blocks": [heads], "mlp_blocks": [moe, dense]}
    count = count_parameters(from_dict(BASE | blocks))
    expert = 3 * 24 * 32 + 2 * 24 + 32
    assert count.total - count.active == 4 * expert


def test_a_window_counts_what_it_shows():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    configs = [
        from_dict(BASE | {"sequence_mixer_blocks": [heads | {"sliding_window": window}]})
        for window in (1, 5, 64, 1000, None)
    ]
    S = 64
    seen = [sum(min(i + 1, window) for i in range(S)) / S for window in (1, 5, 64, 64, 64)]
    flops = [flops_per_token(config, S) for config in configs]
    # Two products of 8 channels in 4 heads of 2 layers, three times for training.
    expected = [flops[0] + 3 * 2 * 4 * 4 * 8 * (each - seen[0]) for each in seen]
    assert flops == pytest.approx(expected)


def test_parameters_are_those_of_the_model():
    mlp = {"activation_function": "swiglu", "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    untied = BASE | {"sequence_mixer_blocks": [heads], "mlp_blocks": [mlp]}
    layer = 32 + 64 * 32 + 32 * 32 + 32 + 96 * 32 + 32 * 48
    count = count_parameters(from_dict(untied))
    assert count.total == 2 * layer + 32 + 2 * 64 * 32
    assert count.active == count.total
    assert count.embedding == 2 * 64 * 32
    tied = count_parameters(from_dict(untied | {"tie_word_embeddings": True}))
    assert tied.total == count.total - 64 * 32
    assert tied.embedding == 64 * 32
    learned = untied | {"position_embedding_type": "learned_absolute"}
    assert count_parameters(from_dict(learned)).embedding == 2 * 64 * 32 + 2048 * 32


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756.0),
        ("NVIDIA H200", torch.float16, 989.4),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989.4),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312.0),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5),
        ("NVIDIA A10G", torch.bfloat16, 70.0),
        ("NVIDIA A10", torch.bfloat16, 125.0),
        ("NVIDIA L40S", torch.bfloat16, 362.0),
        ("NVIDIA L4", torch.bfloat16, 121.0),
        ("AMD Instinct MI300X", torch.bfloat16, 1307.4),
        ("Tesla V100-SXM2-16GB", torch.float16, 125.0),
        ("Tesla V100-SXM2-16GB", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", torch.float64, None),
        ("AMD EPYC 7763", torch.bfloat16, None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name, dtype, tera):
    peak = device_peak_flops(name, dtype)
    assert peak == (None if tera is None else pytest.approx(tera * 1e12))

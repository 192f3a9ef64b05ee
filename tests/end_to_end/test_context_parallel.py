"""Models whose sequences are cut over processes compute what one process computes."""

import pytest
import torch
from torch.optim import SGD

from lme_core.config import from_dict
from lme_core.training.objectives import NextToken
from lme_kernels.policy import KernelPolicy
from lme_parallel.equality import assemble, collect, make_args
from lme_parallel.parallelize import parallelize
from lme_parallel.testing import run_distributed
from lme_parallel.topology import Topology

V, ROWS, LENGTH = 61, 2, 16
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EVERYTHING = HEADS | {
    "add_bias": True,
    "qk_norm": True,
    "attention_gate": True,
    "attention_sinks": True,
    "attention_softcap": 2.0,
    "exclusive_self_attention": True,
    "dropout": 0.2,
}
LATENT = {
    "sequence_mixer_type": "multihead_latent_attention",
    "num_attention_heads": 4,
    "query_compression_size": 10,
    "key_value_compression_size": 12,
    "head_dim": 6,
    "value_head_dim": 5,
    "rope_head_dim": 4,
    "add_bias": True,
    "dropout": 0.2,
}
MAMBA = {
    "sequence_mixer_type": "mamba2",
    "state_size": 5,
    "intermediate_size": 24,
    "num_heads": 6,
    "num_groups": 2,
}
DELTA = {
    "sequence_mixer_type": "gated_deltanet",
    "k_head_dim": 3,
    "v_head_dim": 2,
    "num_k_heads": 1,
    "num_v_heads": 2,
    "use_gate": True,
    "allow_neg_eigval": True,
    "kernel_size": 3,
}
LINEAR = {
    "sequence_mixer_type": "linear_attention",
    "k_head_dim": 3,
    "v_head_dim": 2,
    "num_q_heads": 1,
    "num_k_heads": 1,
    "num_v_heads": 2,
    "num_g_heads": 1,
    "kernel_size": 4,
    "activation_function": "silu",
    "normalization_function": "rmsnorm",
}
# With more taps than a process of four has tokens.
CONVOLUTION = {
    "sequence_mixer_type": "causal_convolution",
    "in_channels": 4,
    "out_channels": 8,
    "kernel_size": 7,
    "num_groups": 2,
    "activation_function": "swiglu",
    "add_bias": True,
}
RNN = {
    "sequence_mixer_type": "rnn",
    "state_head_dim": 3,
    "num_input_heads": 1,
    "num_weight_heads": 2,
    "kernel_size": 3,
    "activation_function": "silu",
    "normalization_function": "rmsnorm",
    "gradient_clipping": 0.01,
}
GRU = {
    "sequence_mixer_type": "gru",
    "state_head_dim": 3,
    "num_input_heads": 2,
    "num_forget_input_heads": 2,
    "num_reset_input_heads": 1,
    "num_weight_heads": 1,
    "num_forget_weight_heads": 2,
    "num_reset_weight_heads": 2,
    "kernel_size": 2,
}
LSTM = {
    "sequence_mixer_type": "lstm",
    "state_head_dim": 3,
    "num_input_heads": 2,
    "num_weight_heads": 2,
}
M2RNN = {
    "sequence_mixer_type": "m2rnn",
    "k_head_dim": 3,
    "v_head_dim": 2,
    "num_q_heads": 1,
    "num_k_heads": 1,
    "num_v_heads": 2,
    "num_f_heads": 1,
    "num_g_heads": 2,
    "num_weight_heads": 2,
    "use_residual": True,
    "kernel_size": 3,
    "activation_function": "silu",
}
DENSE = {"activation_function": "swiglu", "intermediate_size": 20, "dropout": 0.2}
EXPERTS = {
    "mlp_type": "MoE",
    "activation_function": "swiglu",
    "intermediate_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "dropout": 0.2,
}
COMMON = {
    "vocab_size": V,
    "hidden_size": 16,
    "position_embedding_type": "rope",
    "rope_dim": 4,
    "initializer_range": 0.3,
    "router_aux_loss_coef": 0.3,
    "router_z_loss_coef": 0.1,
}
MODELS = {
    "attention": {"sequence_mixer_blocks": [EVERYTHING, {**HEADS, "sliding_window": 5}]},
    "learned positions, tied": {
        "position_embedding_type": "learned_absolute",
        "rope_dim": None,
        "max_position_embeddings": LENGTH,
        "embedding_dropout": 0.2,
        "tie_word_embeddings": True,
        "sequence_mixer_blocks": [HEADS],
    },
    "latent attention and experts": {
        "sequence_mixer_blocks": [LATENT, HEADS],
        "mlp_blocks": [EXPERTS],
    },
    "linear recurrences": {"sequence_mixer_blocks": [MAMBA, LINEAR]},
    "other recurrences": {"sequence_mixer_blocks": [DELTA, CONVOLUTION, M2RNN]},
    "vector recurrences": {"sequence_mixer_blocks": [RNN, GRU, LSTM]},
    "gpt_crosslayer": {"sharing_pattern": [0, 0], "sequence_mixer_blocks": [EVERYTHING] * 2},
    "ladder_residual": {"sequence_mixer_blocks": [HEADS, MAMBA], "mlp_blocks": [EXPERTS]},
    "palm": {"sequence_mixer_blocks": [HEADS]},
}
TWO = {"context_parallel_world_size": 2}
BALANCED = {"context_parallel_load_balancing_method": "headtail"}
RING = {"context_parallel_attention": "ring"}
WHOLE = {"stage": 0, "fsdp_algorithm": None}
# Of as many processes, so that they start once: settings, and models, all unless some are named.
LAYOUTS = {
    2: {
        "collected, balanced": ({**TWO, **BALANCED}, MODELS),
        "ring": ({**TWO, **RING, **WHOLE, "gradient_checkpointing_method": "full"}, MODELS),
    },
    4: {
        "four": ({**RING, **BALANCED, **WHOLE, "context_parallel_world_size": 4}, MODELS),
        "two shards": (
            {**TWO, **RING, "stage": 3},
            ("attention", "latent attention and experts", "other recurrences"),
        ),
        "two, tensor": (
            {**TWO, **BALANCED, "tensor_parallel_world_size": 2, "sequence_parallel": True},
            ("attention", "linear recurrences", "vector recurrences"),
        ),
    },
}


def build(name):
    fields = {"model_type": name if "_" in name or name == "palm" else "gpt_base"}
    layers = len(MODELS[name]["sequence_mixer_blocks"])
    config = from_dict(
        {**COMMON, "num_layers": layers, "mlp_blocks": [DENSE], **MODELS[name], **fields}
    )
    with torch.device("meta"):
        return config, config.build(KernelPolicy(), seed=3)


def micro_batches(count):
    """Rows with padding, rows of packed documents, one after the other; one has no target."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        ids = torch.randint(V, (ROWS, LENGTH), generator=generator)
        labels = torch.randint(V, (ROWS, LENGTH), generator=generator)
        index = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) + number * ROWS * LENGTH
        if number == 2:
            labels = torch.full_like(labels, -100)
        batch = {"input_ids": ids, "token_index": index, "dropout_key": torch.tensor(77)}
        if number % 2:
            # Where rows are cut (4, 8, 12, ...), beside it, of one token, over several processes.
            bounds = [0, 1, 4, 7, 8, 15, LENGTH, LENGTH + 2, 2 * LENGTH]
            bounds = bounds if number == 1 else [0, 5, LENGTH, LENGTH + 8, LENGTH + 9, 2 * LENGTH]
            batch["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
            batch["position_ids"] = torch.arange(LENGTH).repeat(ROWS, 1)
        else:
            # A row is as long as no number of processes: it is padded further.
            ids, labels, index = (each[:, :-1] for each in (ids, labels, index))
            valid = torch.arange(LENGTH - 1) < torch.tensor([[3], [LENGTH - 1]])
            labels = labels.where(valid, -100)
            batch |= {"input_ids": ids, "token_index": index, "valid": valid}
        made.append({**batch, "labels": labels})
    return made


def train(names, settings, world_size, rank, dtype):
    """Train each model for a step; return by name what is here before and after it."""
    args = make_args(settings)
    topology = Topology.from_args(args, world_size, rank)
    found = {}
    for name in names:
        config, model = build(name)
        runtime = parallelize(
            model.to(getattr(torch, dtype)),
            topology,
            args,
            device=torch.device("cpu"),
            dtype=getattr(torch, dtype),
            initial_value=model.initial_value,
        )
        optimizer = SGD(runtime.named_parameters().values(), lr=0.1)
        objective = NextToken(config.auxiliary_weights())
        found[name] = [{"parameters": collect(runtime)}]
        batches = micro_batches(4)[topology.data_rank :: topology.data_world_size]
        sums = runtime.forward_backward(objective, batches)
        gradients = collect(runtime, gradients=True)
        norm = runtime.clip_gradients(0.5)
        optimizer.step()
        runtime.finish_step()
        numbers = {"loss": sums.loss, "norm": norm, **sums.values}
        if topology.data_world_size == 1:
            numbers["evaluated"] = runtime.forward(objective, batches[1]).total
        found[name].append(
            {"gradients": gradients, "parameters": collect(runtime), "numbers": numbers}
        )
    return found


def train_here(layouts, dtype):
    place = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return {
        layout: train(names, settings, *place, dtype)
        for layout, (settings, names) in layouts.items()
    }


@pytest.fixture(scope="module")
def single():
    return train(list(MODELS), {}, 1, 0, "float64")


def relative(actual, expected):
    """Norm of the difference over the norm; sums over processes are taken in another order.

    Some gradients are zero but for roundings: those of biases that add the same to all scores.
    """
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-3))


@pytest.mark.parametrize("size", LAYOUTS)
def test_losses_gradients_and_parameters_are_those_of_one_process(size, single):
    layouts = {
        layout: (settings, list(names)) for layout, (settings, names) in LAYOUTS[size].items()
    }
    ranks = run_distributed(train_here, size, layouts, "float64")
    wrong = {}
    for layout, (_, names) in LAYOUTS[size].items():
        for name in names:
            for step, expected in enumerate(single[name]):
                found = [each[layout][name][step] for each in ranks]
                wrong |= differences(found, expected, (layout, name, step))
    assert not wrong


def differences(found, expected, where):
    """What is further apart than sums in another order would be, by its name."""
    wrong = {}
    for kind in expected.keys() - {"numbers"}:
        wholes, is_same = assemble([each[kind] for each in found])
        references, _ = assemble([expected[kind]])
        assert is_same, where
        assert wholes.keys() == references.keys()
        for name, reference in references.items():
            difference = relative(wholes[name], reference)
            if difference > (0.0 if where[-1] == 0 else 1e-10):
                wrong[*where, kind, name] = difference
    for each in found:
        for term, number in each.get("numbers", {}).items():
            difference = relative(number, expected["numbers"][term])
            if difference > 1e-10:
                wrong[*where, term] = difference
    return wrong

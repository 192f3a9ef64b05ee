"""Models cut over tensor-parallel processes compute what one process computes."""

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

V, ROWS, LENGTH, STEPS = 61, 2, 12, 2
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EVERYTHING = HEADS | {
    "add_bias": True,
    "qk_norm": True,
    "attention_gate": True,
    "attention_sinks": True,
    "exclusive_self_attention": True,
    "softmax_dropout": 0.2,
    "dropout": 0.2,
}
LATENT = {
    "sequence_mixer_type": "multihead_latent_attention",
    "num_attention_heads": 4,
    "query_compression_size": 10,
    "key_value_compression_size": 12,
    "head_dim": 6,
    "rope_head_dim": 4,
    "softmax_dropout": 0.2,
    "add_bias": True,
}
MAMBA = {
    "sequence_mixer_type": "mamba2",
    "state_size": 5,
    "intermediate_size": 24,
    "num_heads": 6,
    "num_groups": 2,
}
DENSE = {"activation_function": "swiglu", "intermediate_size": 20, "dropout": 0.2, "add_bias": True}
PLAIN = {"activation_function": "prelu", "intermediate_size": 20, "add_bias": True}
EXPERTS = {
    "mlp_type": "MoE",
    "activation_function": "swiglu",
    "intermediate_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 8,
    "shared_expert_gating": True,
    "add_bias": True,
    "dropout": 0.2,
}
COMMON = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_layers": 2,
    "position_embedding_type": "rope",
    "rope_dim": 4,
    "initializer_range": 0.3,
    "router_aux_loss_coef": 0.3,
    "router_z_loss_coef": 0.1,
}
MODELS = {
    "attention": {"sequence_mixer_blocks": [EVERYTHING], "mlp_blocks": [DENSE]},
    "learned positions, tied": {
        "position_embedding_type": "learned_absolute",
        "rope_dim": None,
        "max_position_embeddings": LENGTH,
        "embedding_dropout": 0.2,
        "tie_word_embeddings": True,
        "normalization_function": "layernorm",
        "sequence_mixer_blocks": [HEADS],
        "mlp_blocks": [PLAIN],
        "m_width": 2.0,
        "m_residual": 0.7,
    },
    "a recurrence and experts": {
        "sequence_mixer_blocks": [HEADS, MAMBA],
        "mlp_blocks": [EXPERTS, DENSE],
    },
    "latent attention": {"sequence_mixer_blocks": [LATENT], "mlp_blocks": [DENSE]},
    "gpt_crosslayer": {
        "sharing_pattern": [0, 0],
        "sequence_mixer_blocks": [EVERYTHING],
        "mlp_blocks": [DENSE],
    },
    "ladder_residual": {"sequence_mixer_blocks": [HEADS], "mlp_blocks": [EXPERTS]},
    "palm": {"sequence_mixer_blocks": [HEADS], "mlp_blocks": [DENSE]},
}
# Of as many processes, so that they start once.
LAYOUTS = {
    2: {
        "two": {"tensor_parallel_world_size": 2, "stage": 0, "fsdp_algorithm": None},
        "two, sequence cut": {"tensor_parallel_world_size": 2, "sequence_parallel": True},
    },
    4: {
        "two shards": {"tensor_parallel_world_size": 2, "sequence_parallel": True, "stage": 3},
    },
}


def build(name):
    fields = {"model_type": name if "_" in name or name == "palm" else "gpt_base"}
    config = from_dict({**COMMON, **MODELS[name], **fields})
    with torch.device("meta"):
        return config, config.build(KernelPolicy(), seed=3)


def micro_batches(step, count):
    """Rows with padding, rows of packed documents, one after the other."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for number in range(count):
        ids = torch.randint(V, (ROWS, LENGTH), generator=generator)
        labels = torch.randint(V, (ROWS, LENGTH), generator=generator)
        index = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) + number * ROWS * LENGTH
        batch = {"input_ids": ids, "token_index": index, "dropout_key": torch.tensor(77 + step)}
        if number % 2:
            batch["cu_seqlens"] = torch.tensor([0, 5, LENGTH, 2 * LENGTH], dtype=torch.int32)
            batch["position_ids"] = torch.arange(LENGTH).repeat(ROWS, 1)
        else:
            # A row is as long as no number of processes: it is padded further.
            ids, labels, index = (each[:, :-1] for each in (ids, labels, index))
            valid = torch.arange(LENGTH - 1) < torch.tensor([[9], [11]])
            labels = labels.where(valid, -100)
            batch |= {"input_ids": ids, "token_index": index, "valid": valid}
        made.append({**batch, "labels": labels})
    return made


def train(names, settings, world_size, rank, dtype):
    """Train each model; return by name what is here after each step."""
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
        optimizer = SGD(runtime.named_parameters().values(), lr=0.1, momentum=0.9)
        objective = NextToken(config.auxiliary_weights())
        history = [{"parameters": collect(runtime)}]
        for step in range(STEPS):
            # Two for each process of data parallelism, of which there are at most two.
            batches = micro_batches(step, 4)[topology.data_rank :: topology.data_world_size]
            sums = runtime.forward_backward(objective, batches)
            gradients = collect(runtime, gradients=True)
            norm = runtime.clip_gradients(0.5)
            optimizer.step()
            runtime.finish_step()
            evaluated = runtime.forward(objective, batches[0]).total
            numbers = {"loss": sums.loss, "norm": norm, **sums.values}
            if topology.data_world_size == 1:
                numbers["evaluated"] = evaluated
            history.append(
                {"gradients": gradients, "parameters": collect(runtime), "numbers": numbers}
            )
        found[name] = history
    return found


def train_here(layouts, dtype):
    place = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return {
        layout: train(list(MODELS), settings, *place, dtype) for layout, settings in layouts.items()
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
    ranks = run_distributed(train_here, size, LAYOUTS[size], "float64")
    for layout in LAYOUTS[size]:
        for name, history in single.items():
            for step, expected in enumerate(history):
                found = [each[layout][name][step] for each in ranks]
                compare(found, expected, (layout, name, step))


def compare(found, expected, where):
    for kind in expected.keys() - {"numbers"}:
        wholes, is_same = assemble([each[kind] for each in found])
        references, _ = assemble([expected[kind]])
        assert is_same, where
        assert wholes.keys() == references.keys()
        for name, reference in references.items():
            if where[-1] == 0:
                assert torch.equal(wholes[name], reference), (*where, name)
            assert relative(wholes[name], reference) < 1e-10, (*where, kind, name)
    for each in found:
        for term, number in each.get("numbers", {}).items():
            assert relative(number, expected["numbers"][term]) < 1e-10, (*where, term)

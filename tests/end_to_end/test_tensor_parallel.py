"""Models cut over tensor-parallel processes compute what one process computes."""

from dataclasses import dataclass

import pytest
import torch
from torch.optim import SGD

from lme_core.config import from_dict
from lme_core.training.objectives import NextToken
from lme_kernels.policy import KernelPolicy
from lme_parallel.checkpoint.args import SaveArgs
from lme_parallel.checkpoint.checkpointer import Checkpointer
from lme_parallel.equality import assemble, collect, make_args
from lme_parallel.parallelize import parallelize
from lme_parallel.testing import run_distributed
from lme_parallel.topology import Topology

V, ROWS, LENGTH, STEPS = 61, 2, 12, 2
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ACROSS = HEADS | {"qk_norm": True, "qk_norm_across_heads": True}
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
ONE_GROUP = MAMBA | {"num_groups": 1, "state_size": 6, "add_bias": True}
BY_GROUP = MAMBA | {"num_heads": 4, "normalize_by_group": True}
THREE_GROUPS = MAMBA | {"num_groups": 3, "state_size": 4, "normalization_function": "layernorm"}
DELTA = {
    "sequence_mixer_type": "gated_deltanet",
    "k_head_dim": 6,
    "v_head_dim": 5,
    "num_k_heads": 2,
    "num_v_heads": 4,
    "use_gate": True,
    "allow_neg_eigval": True,
    "kernel_size": 3,
}
ONE_KEY = DELTA | {"num_k_heads": 1, "num_v_heads": 2, "use_gate": False, "norm_before_gate": True}
LINEAR = {
    "sequence_mixer_type": "linear_attention",
    "k_head_dim": 6,
    "v_head_dim": 4,
    "num_q_heads": 1,
    "num_k_heads": 2,
    "num_v_heads": 4,
    "num_g_heads": 1,
    "kernel_size": 3,
    "activation_function": "gelu",
    "add_bias": True,
    "normalization_function": "p_norm",
}
NO_NORM = LINEAR | {"num_q_heads": 4, "num_g_heads": 2, "normalization_function": None}
VECTOR = {
    "state_head_dim": 4,
    "kernel_size": 3,
    "normalization_function": "rmsnorm",
    "num_input_heads": 4,
    "gradient_clipping": 0.2,
}
GRU = VECTOR | {
    "sequence_mixer_type": "gru",
    "num_forget_input_heads": 1,
    "num_reset_input_heads": 2,
    "num_weight_heads": 2,
    "num_forget_weight_heads": 4,
    "num_reset_weight_heads": 1,
    "add_bias": True,
}
RNN = VECTOR | {"sequence_mixer_type": "rnn", "num_weight_heads": 2, "kernel_size": None}
LSTM = VECTOR | {"sequence_mixer_type": "lstm", "num_input_heads": 2, "num_weight_heads": 4}
MATRICES = {
    "sequence_mixer_type": "m2rnn",
    "k_head_dim": 4,
    "v_head_dim": 6,
    "num_q_heads": 1,
    "num_k_heads": 2,
    "num_v_heads": 4,
    "num_f_heads": 2,
    "num_g_heads": 1,
    "num_weight_heads": 1,
    "use_residual": True,
    "kernel_size": 3,
    "activation_function": "silu",
    "add_bias": True,
    "normalization_function": "rmsnorm",
}
OWN_MATRICES = MATRICES | {"num_weight_heads": 2, "use_residual": False, "num_g_heads": 4}
CONVOLUTION = {
    "sequence_mixer_type": "causal_convolution",
    "in_channels": 12,
    "out_channels": 16,
    "kernel_size": 3,
    "num_groups": 1,
    "add_bias": True,
}
GROUPED = CONVOLUTION | {"num_groups": 4, "activation_function": "swiglu"}
# What two processes cannot share is whole in both.
ODD = MAMBA | {"num_heads": 3, "num_groups": 1}
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
    "mamba2": {"sequence_mixer_blocks": [ONE_GROUP, BY_GROUP, THREE_GROUPS]},
    "gated deltanet": {"sequence_mixer_blocks": [DELTA, ONE_KEY]},
    "linear attention": {"sequence_mixer_blocks": [LINEAR, NO_NORM]},
    "gru, rnn, lstm": {"sequence_mixer_blocks": [GRU, RNN, LSTM]},
    "m2rnn": {"sequence_mixer_blocks": [MATRICES, OWN_MATRICES]},
    "convolutions": {"sequence_mixer_blocks": [CONVOLUTION, GROUPED, ODD]},
    "palm": {"sequence_mixer_blocks": [ACROSS], "mlp_blocks": [DENSE]},
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
    layers = {"num_layers": max(2, len(MODELS[name]["sequence_mixer_blocks"]))}
    common = {**COMMON, **layers, "mlp_blocks": [PLAIN]}
    config = from_dict({**common, **MODELS[name], **fields})
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


@dataclass
class State:
    step: int = 0
    tokens: int = 0


def resume(names, settings, folder, world_size, rank):
    """Restore each model if it was saved, train one step, save; return parameters before and after.

    Sections of rows are cut one by one, so that what is here is no rectangle.
    """
    args = make_args(settings)
    topology = Topology.from_args(args, world_size, rank)
    found = {}
    for name in names:
        config, model = build(name)
        runtime = parallelize(
            model.to(torch.float64),
            topology,
            args,
            device=torch.device("cpu"),
            dtype=torch.float64,
            initial_value=model.initial_value,
        )
        optimizer = SGD(runtime.named_parameters().values(), lr=0.1, momentum=0.9)
        state = State()
        checkpointer = Checkpointer(
            SaveArgs(save_path=f"{folder}/{name}", save_interval=1),
            parameters=runtime.named_parameters(),
            buffers=runtime.named_buffers(),
            optimizer=optimizer,
            stateful={},
            documents={"config.json": {}},
            topology=topology,
            shards=runtime.shards(),
            after_restore=runtime.finish_step,
        )
        checkpointer.restore(state)
        before = collect(runtime)
        batches = micro_batches(state.step, 4)[topology.data_rank :: topology.data_world_size]
        runtime.forward_backward(NextToken(config.auxiliary_weights()), batches)
        optimizer.step()
        runtime.finish_step()
        state.step += 1
        checkpointer.save(state)
        checkpointer.wait()
        found[name] = {"before": before, "after": collect(runtime)}
    return found


def resume_here(*arguments):
    return resume(*arguments, torch.distributed.get_world_size(), torch.distributed.get_rank())


def test_sections_of_rows_are_saved_and_read_by_any_layout(tmp_path):
    names, straight = ["mamba2", "gru, rnn, lstm"], str(tmp_path / "straight")
    layouts = [LAYOUTS[4]["two shards"], {}, {"tensor_parallel_world_size": 2}]
    last = None
    for settings, size in zip(layouts, (4, 1, 2), strict=True):
        expected = resume(names, {}, straight, 1, 0)
        arguments = (names, settings, str(tmp_path / "moved"))
        ranks = run_distributed(resume_here, size, *arguments) if size > 1 else None
        ranks = ranks or [resume(*arguments, 1, 0)]
        for name in names:
            before, after = (
                assemble([each[name][kind] for each in ranks])[0] for kind in ("before", "after")
            )
            if last is not None:
                assert all(torch.equal(before[each], last[name][each]) for each in before)
            for each, reference in assemble([expected[name]["after"]])[0].items():
                assert relative(after[each], reference) < 1e-10, (name, each)
        last = {name: assemble([each[name]["after"] for each in ranks])[0] for name in names}

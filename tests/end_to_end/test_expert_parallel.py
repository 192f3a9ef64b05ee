"""Mixtures of experts over processes compute, and resume, what one process does."""

import pytest
import torch
from torch.optim import SGD

from lme_core.config import from_dict
from lme_core.training.experts import ExpertBalance
from lme_core.training.objectives import NextToken
from lme_kernels.policy import KernelPolicy
from lme_parallel.equality import assemble, collect, make_args
from lme_parallel.parallelize import parallelize
from lme_parallel.testing import run_distributed
from lme_parallel.topology import Topology

V, ROWS, LENGTH, STEPS = 61, 2, 12, 3
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SOFTMAX = {
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
# Chosen by a bias that moves once a step.
SIGMOID = {
    "mlp_type": "MoE",
    "activation_function": "gelu",
    "intermediate_size": 10,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_expert_groups": 2,
    "num_groups_per_tok": 1,
    "router_score_function": "sigmoid",
    "routed_scaling_factor": 1.7,
    "expert_bias_update_rate": 0.05,
}
# Of an activation that no fused op has.
SLOW = {
    "mlp_type": "MoE",
    "activation_function": "tanh",
    "intermediate_size": 10,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "normalized_topk": False,
}
DENSE = {"activation_function": "swiglu", "intermediate_size": 20}
COMMON = {
    "model_type": "gpt_base",
    "vocab_size": V,
    "hidden_size": 16,
    "position_embedding_type": "rope",
    "rope_dim": 4,
    "initializer_range": 0.3,
    "router_aux_loss_coef": 0.3,
    "router_z_loss_coef": 0.1,
    "sequence_mixer_blocks": [HEADS],
}
MODELS = {
    "all alike": [SOFTMAX] * 2,
    "mixed": [DENSE, SLOW, SIGMOID],
}
SOFTMAX_ALONE = MODELS["all alike"]
DDP = {"stage": 0, "fsdp_algorithm": None}
TWO = {"expert_parallel_world_size": 2}
RECOMPUTE = {"gradient_checkpointing_method": "full"}
# Of as many processes, so that they start once.
LAYOUTS = {
    2: {
        "shards": {"stage": 3},
        "DDP": DDP,
        "tensor": {"tensor_parallel_world_size": 2, "sequence_parallel": True, "stage": 1},
        "experts, DDP": {**TWO, **DDP},
        "experts, stage 3": {**TWO, "stage": 3, **RECOMPUTE},
    },
    4: {
        "experts 2, shards 2": {**TWO, "stage": 3},
        "experts 4, context 2": {
            "expert_parallel_world_size": 4,
            "context_parallel_world_size": 2,
            "stage": 1,
        },
        "experts 2, pipeline 2": {
            **TWO,
            "pipeline_parallel_world_size": 2,
            "num_pipeline_stages": 2,
            "pipeline_parallel_schedule": "1F1B",
            **DDP,
        },
        "experts 2, tensor 2": {**TWO, "tensor_parallel_world_size": 2, "stage": 2},
    },
}


def micro_batches(step, count):
    """Rows with padding and rows of packed documents; in the second step some have no token."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for number in range(count):
        ids = torch.randint(V, (ROWS, LENGTH), generator=generator)
        labels = torch.randint(V, (ROWS, LENGTH), generator=generator)
        index = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) + number * ROWS * LENGTH
        batch = {"input_ids": ids, "token_index": index, "dropout_key": torch.tensor(77 + step)}
        if number % 4 == 2:
            batch["cu_seqlens"] = torch.tensor([0, 5, LENGTH, 2 * LENGTH], dtype=torch.int32)
            batch["position_ids"] = torch.arange(LENGTH).repeat(ROWS, 1)
        else:
            lengths = torch.tensor([[9], [12]])
            # All micro batches of the second of two processes.
            valid = torch.arange(LENGTH) < (lengths * 0 if step == 1 and number % 2 else lengths)
            labels = labels.where(valid, -100)
            batch["valid"] = valid
        made.append({**batch, "labels": labels})
    return made


def train(blocks, settings, world_size, rank, dtype, device="cpu"):
    """Train a model; return on the CPU what is here after each step."""
    args = make_args(settings)
    topology = Topology.from_args(args, world_size, rank)
    config = from_dict({**COMMON, "num_layers": len(blocks), "mlp_blocks": blocks})
    with torch.device("meta"):
        model = config.build(KernelPolicy(), seed=3)
    runtime = parallelize(
        model.to(getattr(torch, dtype)),
        topology,
        args,
        device=torch.device(device),
        dtype=getattr(torch, dtype),
        initial_value=model.initial_value,
    )
    optimizer = SGD(runtime.named_parameters().values(), lr=0.1, momentum=0.9)
    objective = NextToken(config.auxiliary_weights())
    balance = ExpertBalance.of(config, runtime.named_buffers())
    history = [{"parameters": collect(runtime)}]
    for step in range(STEPS):
        # Some for each process of data parallelism, of which there are at most four.
        batches = micro_batches(step, 4)[topology.data_rank :: topology.data_world_size]
        sums = runtime.forward_backward(objective, batches)
        gradients = collect(runtime, gradients=True)
        norm = runtime.clip_gradients(0.5)
        optimizer.step()
        if balance is not None:
            balance(sums.values, torch.isfinite(norm))
        runtime.finish_step()
        numbers = {"loss": sums.loss, "norm": norm, **sums.values}
        numbers |= runtime.named_buffers()
        numbers = {name: each.detach().cpu().clone() for name, each in numbers.items()}
        history.append({"gradients": gradients, "parameters": collect(runtime), "numbers": numbers})
    return history


def train_here(layouts, dtype):
    place = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return {
        layout: {name: train(each, settings, *place, dtype) for name, each in MODELS.items()}
        for layout, settings in layouts.items()
    }


def relative(actual, expected):
    """Norm of the difference over the norm; sums over processes are taken in another order."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-3))


@pytest.fixture(scope="module")
def single():
    return {name: train(each, {}, 1, 0, "float64") for name, each in MODELS.items()}


@pytest.mark.parametrize("size", LAYOUTS)
def test_losses_statistics_and_parameters_are_those_of_one_process(size, single):
    ranks = run_distributed(train_here, size, LAYOUTS[size], "float64")
    for layout in LAYOUTS[size]:
        for name, history in single.items():
            for step, expected in enumerate(history):
                found = [each[layout][name][step] for each in ranks]
                compare(found, expected, (layout, name, step), 1e-10)


def test_fp32_stays_within_roundings():
    layouts = {name: LAYOUTS[2][name] for name in ("experts, DDP", "experts, stage 3")}
    expected = train(SOFTMAX_ALONE, {}, 1, 0, "float32")
    ranks = run_distributed(train_alone, 2, layouts)
    for layout in layouts:
        for step, reference in enumerate(expected):
            found = [each[layout][step] for each in ranks]
            actual, _ = assemble([each["parameters"] for each in found])
            whole, _ = assemble([reference["parameters"]])
            pairs = [(actual[name].flatten(), whole[name].flatten()) for name in whole]
            assert relative(*(torch.cat(each) for each in zip(*pairs, strict=True))) < 1e-6
            for name, number in reference.get("numbers", {}).items():
                assert all(relative(each["numbers"][name], number) < 1e-6 for each in found), name


def train_alone(layouts):
    place = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return {
        layout: train(SOFTMAX_ALONE, settings, *place, "float32")
        for layout, settings in layouts.items()
    }


@pytest.mark.multigpu
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_two_gpus_train_as_one(dtype):
    names = ("experts, DDP", "experts, stage 3")
    (expected,) = run_distributed(train_on_gpus, 1, {"one": {}}, dtype, device_type="cuda")
    layouts = {name: LAYOUTS[2][name] for name in names}
    ranks = run_distributed(train_on_gpus, 2, layouts, dtype, device_type="cuda")
    # fp64 runs in plain torch, fp32 in the fused op.
    bound = 1e-10 if dtype == "float64" else 1e-5
    for layout in layouts:
        for name, history in expected["one"].items():
            for step, reference in enumerate(history):
                found = [each[layout][name][step] for each in ranks]
                compare(found, reference, (layout, name, step), bound)


def train_on_gpus(layouts, dtype):
    is_alone = not torch.distributed.is_initialized()
    rank = 0 if is_alone else torch.distributed.get_rank()
    place = (1, 0) if is_alone else (torch.distributed.get_world_size(), rank)
    device = f"cuda:{rank}"
    return {
        layout: {
            name: train(each, settings, *place, dtype, device) for name, each in MODELS.items()
        }
        for layout, settings in layouts.items()
    }


def compare(found, expected, where, bound):
    for kind in expected.keys() - {"numbers"}:
        wholes, is_same = assemble([each[kind] for each in found])
        references, _ = assemble([expected[kind]])
        assert is_same, where
        assert wholes.keys() == references.keys()
        for name, reference in references.items():
            if where[-1] == 0:
                assert torch.equal(wholes[name], reference), (*where, name)
            assert relative(wholes[name], reference) < bound, (*where, kind, name)
    for name, number in expected.get("numbers", {}).items():
        # A stage of a pipeline has the biases of its own layers.
        numbers = [each["numbers"][name] for each in found if name in each["numbers"]]
        assert len(numbers) == len(found) or "selection_bias" in name
        assert numbers, (*where, name)
        for actual in numbers:
            assert relative(actual, number) < bound, (*where, name)
            if "expert_counts" in name or "selection_bias" in name:
                assert torch.equal(actual, number), (*where, name)


def test_the_biases_moved_and_the_step_without_tokens_was_one(single):
    bias = single["mixed"][-1]["numbers"]["blocks.2.mlp.router.selection_bias"]
    assert bias.abs().max() > 0.05
    first, second = (single["all alike"][step]["numbers"]["router_tokens.0"] for step in (1, 2))
    assert 0 < second < first

"""Models cut into pipeline stages compute what one process computes."""

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

V, ROWS, LENGTH, STEPS, MICRO = 61, 2, 12, 2, 4
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "softmax_dropout": 0.2}
DENSE = {"activation_function": "swiglu", "intermediate_size": 20, "dropout": 0.2, "add_bias": True}
EXPERTS = {
    "mlp_type": "MoE",
    "activation_function": "swiglu",
    "intermediate_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "router_score_function": "sigmoid",
    "expert_bias_update_rate": 0.1,
}
COMMON = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_layers": 4,
    "position_embedding_type": "rope",
    "initializer_range": 0.3,
    "router_aux_loss_coef": 0.3,
    "router_z_loss_coef": 0.1,
    "sequence_mixer_blocks": [ATTENTION],
    "mlp_blocks": [DENSE],
}
MODELS = {
    # Auxiliary losses in the first stage only.
    "experts before the rest, tied": {
        "tie_word_embeddings": True,
        "mlp_blocks": [EXPERTS, DENSE, DENSE, DENSE],
        "embedding_dropout": 0.2,
    },
    "experts everywhere, learned positions": {
        "position_embedding_type": "learned_absolute",
        "max_position_embeddings": LENGTH,
        "mlp_blocks": [EXPERTS],
    },
    # The stages pass on keys and values, which half of them do not read.
    "gpt_crosslayer": {"model_type": "gpt_crosslayer", "sharing_pattern": [0, 0, 2, 2]},
    "ladder_residual": {"model_type": "ladder_residual", "mlp_blocks": [DENSE]},
}
WHOLE = {"stage": 0, "fsdp_algorithm": None, "pipeline_parallel_world_size": 2}
LAYOUTS = {
    "1F1B": {**WHOLE, "num_pipeline_stages": 2, "pipeline_parallel_schedule": "1F1B"},
    "zero bubble": {**WHOLE, "num_pipeline_stages": 4, "pipeline_parallel_schedule": "DualPipeV"},
    "recomputed shards": {
        "pipeline_parallel_world_size": 2,
        "num_pipeline_stages": 4,
        "pipeline_parallel_schedule": "InterleavedZeroBubble",
        "gradient_checkpointing_method": "block",
        "gradient_checkpointing_args": {"num_blocks": 3},
    },
}


def build(name):
    config = from_dict({"model_type": "gpt_base", **COMMON, **MODELS[name]})
    with torch.device("meta"):
        return config, config.build(KernelPolicy(), seed=3)


def micro_batches(step):
    """Rows with padding, rows of other documents each time, rows without a target."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for number in range(MICRO):
        ids = torch.randint(V, (ROWS, LENGTH), generator=generator)
        labels = torch.randint(V, (ROWS, LENGTH), generator=generator)
        index = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) + number * ROWS * LENGTH
        batch = {"input_ids": ids, "token_index": index, "dropout_key": torch.tensor(77 + step)}
        if number % 2:
            ends = [0, *range(3 + number, LENGTH, 3), LENGTH, 2 * LENGTH]
            batch["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
            batch["position_ids"] = torch.arange(LENGTH).repeat(ROWS, 1)
        else:
            valid = torch.arange(LENGTH) < torch.tensor([[9], [11]])
            labels = labels.where(valid, -100)
            batch["valid"] = valid
        if number == 2:
            labels = torch.full_like(labels, -100)
        made.append({**batch, "labels": labels})
    return made


def train(settings, world_size, rank):
    """Evaluate, then train each model; return by name what is here after each step."""
    args = make_args(settings)
    topology = Topology.from_args(args, world_size, rank)
    found = {}
    for name in MODELS:
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
        objective = NextToken(config.auxiliary_weights())
        # Shorter rows than in training.
        short = {key: each[:, :7] for key, each in micro_batches(9)[0].items() if each.ndim}
        numbers = {"evaluated": runtime.forward(objective, short).total}
        history = [{"parameters": collect(runtime), "numbers": numbers}]
        for step in range(STEPS):
            sums = runtime.forward_backward(objective, micro_batches(step))
            gradients = collect(runtime, gradients=True)
            norm = runtime.clip_gradients(0.5)
            optimizer.step()
            runtime.finish_step()
            evaluated = runtime.forward(objective, short).total
            numbers = {"loss": sums.loss, "norm": norm, **sums.values, "evaluated": evaluated}
            history.append(
                {"gradients": gradients, "parameters": collect(runtime), "numbers": numbers}
            )
        found[name] = history
    return found


def train_here():
    place = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return {layout: train(settings, *place) for layout, settings in LAYOUTS.items()}


@pytest.fixture(scope="module")
def single():
    return train({}, 1, 0)


@pytest.fixture(scope="module")
def ranks():
    return run_distributed(train_here, 2)


def relative(actual, expected):
    """Norm of the difference over the norm; sums over processes are taken in another order."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-3))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_gradients_and_parameters_are_those_of_one_process(layout, name, single, ranks):
    for step, expected in enumerate(single[name]):
        found = [each[layout][name][step] for each in ranks]
        for kind in expected.keys() - {"numbers"}:
            wholes, is_same = assemble([each[kind] for each in found])
            references, _ = assemble([expected[kind]])
            assert is_same
            assert wholes.keys() == references.keys()
            for parameter, reference in references.items():
                if step == 0:
                    assert torch.equal(wholes[parameter], reference), parameter
                assert relative(wholes[parameter], reference) < 1e-10, (kind, parameter)
        for each in found:
            assert each["numbers"].keys() == expected["numbers"].keys()
            for term, number in each["numbers"].items():
                assert number.shape == expected["numbers"][term].shape
                assert relative(number, expected["numbers"][term]) < 1e-10, term


def test_every_process_logs_the_same_bits(ranks):
    for first, second in zip(*(each["zero bubble"].values() for each in ranks), strict=True):
        for left, right in zip(first, second, strict=True):
            for term, number in left["numbers"].items():
                assert torch.equal(number, right["numbers"][term]), term

"""The seams between packages that share no code, held by both sides at once."""

import inspect

import pytest
import torch

from lme_core.config import from_dict
from lme_core.training.objectives import NextToken
from lme_core.training.precision import MasterWeights
from lme_core.training.runtime import Runtime, SingleDevice
from lme_core.training.trainer import Saver
from lme_data.build import build_loaders
from lme_data.dataset import DebugClassArgs, DebugDatasetArgs
from lme_kernels.ops.cross_entropy.options import VocabularyShard
from lme_kernels.policy import KernelPolicy
from lme_parallel.args import DistributedArgs
from lme_parallel.checkpoint.checkpointer import Checkpointer
from lme_parallel.parallelize import parallelize
from lme_parallel.runtime import DistributedRuntime
from lme_parallel.tensor.plan import STYLES
from lme_parallel.tensor.vocabulary import VocabularyPart
from lme_parallel.topology import Topology

CONFIG = from_dict(
    {
        "model_type": "gpt_base",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 3,
        "position_embedding_type": "rope",
        "sequence_mixer_blocks": [{"num_attention_heads": 4, "num_key_value_heads": 2}],
        "mlp_blocks": [{"activation_function": "swiglu", "intermediate_size": 48}],
    }
)


def build():
    with torch.device("meta"):
        return CONFIG.build(KernelPolicy(), seed=7)


def batches(count):
    dataset = DebugDatasetArgs(
        data_name="debug", class_args=DebugClassArgs(num_examples=64, sequence_length=16)
    )
    loaders = build_loaders(
        [dataset],
        micro_batch_size=4,
        global_batch_size=4 * count,
        num_training_steps=3,
        vocab_size=64,
    )
    taken = [next(loaders.train) for _ in range(count)]
    loaders.train.close()
    return taken


def runtimes(dtype):
    """One model on both implementations of the seam."""
    plain = build()
    single = SingleDevice(plain, dtype=dtype)
    model = build()
    args = DistributedArgs(stage=0)
    distributed = parallelize(
        model,
        Topology.from_args(args, world_size=1, rank=0),
        args,
        device=torch.device("cpu"),
        dtype=dtype,
        initial_value=model.initial_value,
        masters=MasterWeights,
    )
    return single, distributed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_runtimes_give_the_same_losses_gradients_and_norms(dtype):
    single, distributed = runtimes(dtype)
    data = batches(3)
    results = []
    for runtime in (single, distributed):
        sums = runtime.forward_backward(NextToken({}), data)
        norm = runtime.clip_gradients(0.5)
        gradients = {name: p.grad.clone() for name, p in runtime.named_parameters().items()}
        evaluated = runtime.forward(NextToken({}), data[0])
        results.append((sums, norm, gradients, evaluated))
    (sums, norm, gradients, evaluated), (sums_2, norm_2, gradients_2, evaluated_2) = results
    assert torch.equal(sums.loss, sums_2.loss)
    assert sums.values.keys() == sums_2.values.keys()
    assert torch.equal(sums.targets, sums_2.targets)
    assert torch.equal(norm, norm_2)
    assert gradients.keys() == gradients_2.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_2[name]), name
    assert torch.equal(evaluated.total, evaluated_2.total)


@pytest.mark.parametrize(
    ("protocol", "implementation"),
    [(Runtime, SingleDevice), (Runtime, DistributedRuntime), (Saver, Checkpointer)],
)
def test_every_method_of_a_protocol_takes_the_arguments_it_promises(protocol, implementation):
    for name, method in inspect.getmembers(protocol, inspect.isfunction):
        if name.startswith("_"):
            continue
        promised = inspect.signature(method).parameters
        taken = inspect.signature(getattr(implementation, name)).parameters
        assert list(taken)[: len(promised)] == list(promised), name
        further = list(taken.values())[len(promised) :]
        assert all(each.default is not each.empty for each in further), name


def test_a_loader_fills_the_documented_keys_and_the_model_reads_them():
    (batch,) = batches(1)
    documented = {"input_ids", "labels", "cu_seqlens", "position_ids", "token_index", "valid"}
    assert {"input_ids", "labels", "token_index"} <= batch.keys() <= documented | {"source"}
    for name in ("input_ids", "labels", "token_index"):
        assert batch[name].shape == (4, 16)
        assert batch[name].dtype == torch.int64
    assert torch.equal(batch["token_index"], torch.arange(64).view(4, 16))
    model = build().materialize("cpu")
    outputs = model(batch, logits=False)
    logits = model(batch).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"
    )
    # Two orders of summation in fp32 over 64 targets.
    torch.testing.assert_close(outputs.nll_sum, expected, rtol=1e-5, atol=0.0)


def test_a_model_is_embedding_blocks_by_layer_and_head():
    model = build().materialize("cpu")
    (batch,) = batches(1)
    assert list(model.blocks) == ["0", "1", "2"]
    x, _ = model.run_blocks(model.embed(batch), model.context(batch))
    assert torch.equal(model.head(x).logits, model(batch).logits)


def test_initial_values_are_the_same_for_any_cut():
    model = build()
    for name, parameter in model.named_parameters():
        whole = model.initial_value(name, None)
        assert whole.shape == parameter.shape
        rows = parameter.shape[0]
        cut = (slice(rows // 3, rows - 1), *[slice(None)] * (parameter.dim() - 1))
        assert torch.equal(model.initial_value(name, cut), whole[cut]), name


def test_a_part_of_a_vocabulary_is_what_the_losses_take():
    assert VocabularyPart._fields == VocabularyShard._fields


def test_shard_plans_name_real_children_and_known_styles():
    for path, module in build().named_modules():
        plan = getattr(module, "shard_plan", None)
        for child, style in (plan or {}).items():
            assert style in STYLES, path
            assert hasattr(module, child), f"{path}.{child}"

"""On a GPU: the numbers of the CPU, whatever kernels run, and no wait for the device."""

import copy
from dataclasses import replace

import pytest
import torch

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.generation import generate, left_pad, next_logits
from lme_core.mixers.softmax_attention import SoftmaxAttentionConfig
from lme_core.mlps.dense import DenseMLPConfig
from lme_kernels.policy import KernelPolicy

pytestmark = pytest.mark.gpu

B, S, V = 2, 128, 512
CONFIG = GPTBaseConfig(
    vocab_size=V,
    hidden_size=256,
    num_layers=2,
    max_position_embeddings=256,
    initializer_range=0.05,
    sequence_mixer_blocks=(SoftmaxAttentionConfig(num_attention_heads=4, num_key_value_heads=2),),
    mlp_blocks=(DenseMLPConfig(activation_function="swiglu", intermediate_size=512),),
)
MIXERS = {
    "grouped": {},
    "window": {"sliding_window": 33},
    "qk norm, gate, exclusive": {
        "qk_norm": True,
        "attention_gate": True,
        "exclusive_self_attention": True,
    },
    "dropouts": {"dropout": 0.2, "softmax_dropout": 0.2},
}
# float32 without TF32: roundings through two layers. bfloat16: 8 bits of mantissa, against the
# float32 numbers of the same rounded weights.
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str
)


def pair(fields, dtype, **settings):
    mixers = (replace(CONFIG.mixers()[0], **fields),)
    model = replace(CONFIG, sequence_mixer_blocks=mixers, **settings).build(KernelPolicy())
    # The same rounded weights on both sides.
    device = copy.deepcopy(model).to("cuda", dtype)
    return model.to(dtype).float(), device


def batch(packed):
    ids = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    rows = {
        "input_ids": ids,
        "labels": labels,
        "token_index": torch.arange(B * S).view(B, S),
        "dropout_key": torch.tensor(7),
    }
    if packed:
        rows["cu_seqlens"] = torch.tensor([0, 50, 128, 129, 256], dtype=torch.int32)
        rows["position_ids"] = torch.tensor([[*range(50), *range(78)], [0, *range(127)]])
    return rows


def on_gpu(rows):
    return {name: tensor.cuda() for name, tensor in rows.items()}


def loss_and_gradients(model, rows):
    nll = model(rows, logits=False).nll_sum
    gradients = torch.autograd.grad(nll, list(model.parameters()))
    return nll.detach(), dict(zip(model.state_dict(), gradients, strict=True))


def relative(got, expected):
    return ((got.cpu().float() - expected).norm() / expected.norm()).item()


@DTYPES
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fields", MIXERS.values(), ids=MIXERS)
def test_loss_and_gradients_are_those_of_the_cpu(fields, packed, dtype, tolerance):
    here, there = pair(fields, dtype)
    compare(here, there, batch(packed), tolerance)


# One of each kind of kernel: a compilation takes seconds.
@pytest.mark.parametrize(
    ("name", "packed"), [("grouped", False), ("window", True), ("dropouts", False)]
)
def test_compiled_blocks_have_the_same_numbers(name, packed):
    here, there = pair(MIXERS[name], torch.bfloat16)
    torch.compiler.reset()
    for block in there.blocks.values():
        block.compile(fullgraph=True)
    compare(here, there, batch(packed), 3e-2)


def compare(here, there, rows, tolerance):
    nll, expected = loss_and_gradients(here, rows)
    got_nll, got = loss_and_gradients(there, on_gpu(rows))
    assert relative(got_nll, nll) < tolerance
    for name, gradient in got.items():
        assert relative(gradient, expected[name]) < tolerance, name


@pytest.mark.parametrize("packed", [False, True])
def test_a_forward_and_backward_never_waits_for_the_device(packed):
    _, model = pair({}, torch.bfloat16)
    rows = on_gpu(batch(packed))
    loss_and_gradients(model, rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradients(model, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@DTYPES
@pytest.mark.parametrize("fields", [MIXERS["grouped"], MIXERS["window"]], ids=str)
def test_padded_prompts_continue_as_on_the_cpu(fields, dtype, tolerance):
    here, there = pair(fields, dtype)
    ids, valid = left_pad([[5, 6, 7], list(range(40)), [9]])
    rows = {"input_ids": ids, "valid": valid}
    caches = [model.new_cache(3, 44) for model in (here, there)]
    for step in range(4):
        expected = next_logits(here, rows, caches[0])
        got = next_logits(there, on_gpu(rows), caches[1])
        assert got.isfinite().all()
        assert relative(got, expected) < tolerance
        rows = {"input_ids": torch.tensor([[1], [2], [3]]) + step}
    tokens = generate(there, ids.cuda(), valid=valid.cuda(), max_new_tokens=5, seed=1)
    assert tokens.shape == (3, 5)
    assert tokens.min() >= 0
    assert tokens.max() < V

"""The example of a mixer from outside: it computes its formula, and learns."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from lme_core.flops import flops_per_token
from lme_core.generation import left_pad, next_logits
from lme_core.layers.context import SequenceContext
from lme_kernels.policy import KernelPolicy

PATH = Path(__file__).resolve().parents[3] / "examples" / "own_mixer.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("own_mixer_example", PATH)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_it_learns(example, capsys):
    losses = example.train(60)
    # It starts near the uniform guess of 32 tokens, ln 32 = 3.47, and leaves it.
    assert losses[0] == pytest.approx(3.47, abs=0.3)
    assert losses[-1] < 0.5 * losses[0]
    assert "3 5 7 9 11 13 ->" in capsys.readouterr().out


def test_values_are_those_of_the_formula(example):
    mixer = example.CONFIG.mixers()[0].build(example.CONFIG, 0, KernelPolicy()).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    x = torch.randn(2, 7, 32, generator=generator, dtype=torch.float64)
    rows = []
    # Documents of 3, 4 and 7 tokens.
    for document in x.flatten(0, 1).split([3, 4, 7]):
        state = torch.zeros(32, dtype=x.dtype)
        for token in document:
            value, gate, fade = mixer.input(token).split([32, 32, 4])
            kept = torch.sigmoid(fade).repeat_interleave(8)
            state = kept * state + (1 - kept) * value
            rows.append(mixer.output(state * torch.sigmoid(gate)))
    bounds = torch.tensor([0, 3, 7, 14], dtype=torch.int32)
    got = mixer(x, SequenceContext(cu_seqlens=bounds), None)
    # Rounding in float64.
    torch.testing.assert_close(got.flatten(0, 1), torch.stack(rows), rtol=1e-10, atol=1e-12)


def test_padded_prompts_continue_as_each_alone(example):
    model = example.CONFIG.build(KernelPolicy()).double()
    prompts = [[5, 6, 7, 8], [3], [10, 11]]
    ids, valid = left_pad(prompts)
    got = next_logits(model, {"input_ids": ids, "valid": valid}, model.new_cache(3, 8))
    for row, prompt in zip(got, prompts, strict=True):
        alone = model({"input_ids": torch.tensor([prompt])}).logits[0, -1]
        torch.testing.assert_close(row, alone, rtol=1e-9, atol=1e-10)


def test_its_union_reads_the_old_kinds_and_the_new(example):
    blocks = [{"sequence_mixer_type": "moving_average", "num_heads": 4}, {"head_dim": 8}]
    config = TypeAdapter(example.MyModelConfig).validate_python(
        {"num_layers": 2, "hidden_size": 32, "rope_dim": 4, "sequence_mixer_blocks": blocks}
    )
    kinds = [mixer.sequence_mixer_type for mixer in config.mixers()]
    assert kinds == ["moving_average", "softmax_attention"]
    assert flops_per_token(example.CONFIG, 16) > 0
    with pytest.raises(ValueError, match=r"`num_heads` \(3\) must divide `hidden_size` \(32\)"):
        example.MyModelConfig(
            num_layers=1,
            hidden_size=32,
            rope_dim=4,
            sequence_mixer_blocks=(example.MovingAverageConfig(num_heads=3),),
        )

from dataclasses import replace

import pytest
import torch

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.generation import generate, left_pad, next_logits, sample, stream
from lme_core.mixers.softmax_attention import SoftmaxAttentionConfig
from lme_core.mlps.dense import DenseMLPConfig
from lme_kernels.policy import KernelPolicy

V = 61
CONFIG = GPTBaseConfig(
    vocab_size=V,
    hidden_size=32,
    num_layers=2,
    max_position_embeddings=24,
    initializer_range=0.3,
    sequence_mixer_blocks=(SoftmaxAttentionConfig(num_attention_heads=4, num_key_value_heads=2),),
    mlp_blocks=(DenseMLPConfig(activation_function="swiglu", intermediate_size=40),),
)
MIXERS = {
    "grouped": {},
    "window": {"sliding_window": 3},
    "all": {
        "qk_norm": True,
        "attention_gate": True,
        "exclusive_self_attention": True,
        "sliding_window": 5,
        "attention_softcap": 2.0,
        "attention_sinks": True,
    },
}
PROMPTS = [[5, 6, 7, 8, 9], [3, 4], [10, 11, 12, 13, 14, 15, 16], [1]]


def build(mixer=None, dtype=torch.float64, **fields):
    blocks = (replace(CONFIG.mixers()[0], **(mixer or {})),)
    return replace(CONFIG, sequence_mixer_blocks=blocks, **fields).build(KernelPolicy()).to(dtype)


# float64 for the formula; float32 at the bar that users are promised. Both are rounding in
# products of different shapes.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("positions", ["rope", "learned_absolute", "nope"])
@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
# Tokens one by one; in pieces; all at once.
@pytest.mark.parametrize("pieces", [[7] + [1] * 5, [2, 1, 6, 3], [12]], ids=str)
def test_cached_logits_are_those_without_a_cache(pieces, mixer, positions, dtype, tolerance):
    model = build(mixer, dtype, position_embedding_type=positions)
    ids = torch.randint(0, V, (3, sum(pieces)), generator=torch.Generator().manual_seed(0))
    expected = model({"input_ids": ids}).logits
    cache = model.new_cache(3, sum(pieces))
    with torch.no_grad():
        got = [model({"input_ids": each}, cache=cache).logits for each in ids.split(pieces, 1)]
    error = (torch.cat(got, 1) - expected).abs().max() / expected.abs().max()
    assert error < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", ["rope", "learned_absolute"])
@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_padded_prompts_continue_as_each_alone(mixer, positions, dtype):
    model = build(mixer, dtype, position_embedding_type=positions)
    ids, valid = left_pad(PROMPTS)
    cache = model.new_cache(4, 12)
    alone = [model.new_cache(1, 12) for _ in PROMPTS]
    batch = {"input_ids": ids, "valid": valid}
    batches = [{"input_ids": torch.tensor([prompt])} for prompt in PROMPTS]
    for step in range(5):
        together = next_logits(model, batch, cache)
        apart = torch.cat([next_logits(model, *each) for each in zip(batches, alone, strict=True)])
        assert together.isfinite().all()
        # Rounding in float64; in bfloat16 eight bits through two layers, and no NaN from padding.
        tolerance = 1e-9 if dtype == torch.float64 else 0.05
        assert (together - apart).abs().max() < tolerance * apart.abs().max()
        token = torch.arange(4)[:, None] * 7 + step
        batch = {"input_ids": token}
        batches = [{"input_ids": token[i : i + 1]} for i in range(4)]


def test_greedy_tokens_are_those_of_the_whole_sequence():
    model = build()
    ids, valid = left_pad(PROMPTS)
    got = generate(model, ids, valid=valid, max_new_tokens=6, temperature=0)
    assert got.shape == (4, 6)
    for row, prompt in zip(got.tolist(), PROMPTS, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            logits = model({"input_ids": torch.tensor([tokens])}).logits
            tokens.append(int(logits[0, -1].argmax()))
        assert row == tokens[len(prompt) :]


def test_rows_end_at_their_end_token_and_the_stream_with_the_last():
    model = build()
    ids, valid = left_pad(PROMPTS)
    free = generate(model, ids, valid=valid, max_new_tokens=6, temperature=0)
    ends = [int(free[0, 2]), int(free[1, 3]), int(free[2, 1]), int(free[3, 0])]
    got = generate(
        model, ids, valid=valid, max_new_tokens=6, temperature=0, eos_token_id=ends, pad_token_id=60
    )
    longest = 0
    for row, its in zip(got.tolist(), free.tolist(), strict=True):
        last = next(i for i, token in enumerate(its) if token in ends)
        assert row[: last + 1] == its[: last + 1]
        assert set(row[last + 1 :]) <= {60}
        longest = max(longest, last + 1)
    assert got.shape[1] == longest


def test_a_seed_gives_a_row_the_same_tokens_and_another_seed_others():
    model = build()
    ids, valid = left_pad(PROMPTS)
    options = {"max_new_tokens": 8, "temperature": 2.0}
    first = generate(model, ids, valid=valid, seed=1, **options)
    assert torch.equal(generate(model, ids, valid=valid, seed=1, **options), first)
    assert not torch.equal(generate(model, ids, valid=valid, seed=2, **options), first)
    # The first row does not feel the others.
    alone = generate(model, torch.tensor([PROMPTS[0]]), seed=1, **options)
    assert torch.equal(alone[0], first[0])
    assert torch.equal(
        torch.stack(list(stream(model, ids, valid=valid, seed=1, **options)), 1), first
    )


def test_generation_leaves_the_model_trainable():
    model = build()
    ids = torch.tensor([PROMPTS[2]])
    generate(model, ids, max_new_tokens=2)
    model({"input_ids": ids, "labels": ids}, logits=False).nll_sum.backward()
    assert all(p.grad is not None for p in model.parameters())


LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        # Probabilities 0.57, 0.21, 0.13, 0.08, 0.03 of tokens 1, 3, 0, 4, 2.
        ({"top_p": 0.5}, [1]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.8}, [1, 3, 0]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 3, "top_p": 0.7}, [1, 3]),
    ],
    ids=str,
)
def test_samples_have_the_probabilities_asked_for(options, kept):
    n = 100_000
    # Evenly spaced draws measure the probabilities without noise.
    draw = (torch.arange(n) + 0.5) / n
    tokens = sample(LOGITS.expand(n, 5), draw, **options)
    scores = torch.full_like(LOGITS, -torch.inf)
    scores[kept] = LOGITS[kept] / options.get("temperature", 1.0)
    share = torch.bincount(tokens, minlength=5) / n
    torch.testing.assert_close(share.double(), scores.softmax(0), rtol=0, atol=3 / n)


def test_temperature_zero_and_the_largest_draw():
    most = 1 - 2.0**-24
    assert sample(LOGITS[None], torch.tensor([most]), temperature=0).item() == 1
    assert sample(LOGITS[None], torch.tensor([most]), top_k=2).item() == 3
    assert sample(LOGITS[None].bfloat16(), torch.tensor([most]), top_p=0.8).item() == 0
    assert sample(LOGITS[None], torch.tensor([0.0])).item() == 1


def test_reordering_a_cache_moves_rows():
    model = build()
    ids, valid = left_pad(PROMPTS)
    rows = torch.tensor([2, 2, 0, 1])
    cache, moved = model.new_cache(4, 9), model.new_cache(4, 9)
    next_logits(model, {"input_ids": ids, "valid": valid}, cache)
    next_logits(model, {"input_ids": ids[rows], "valid": valid[rows]}, moved)
    cache.reorder(rows)
    token = torch.tensor([[1], [2], [3], [4]])
    got = next_logits(model, {"input_ids": token}, cache)
    expected = next_logits(model, {"input_ids": token}, moved)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"temperature": -1}, "`temperature` must be at least 0"),
        ({"top_k": 0}, "`top_k` must be at least 1"),
        ({"top_p": 0.0}, "`top_p` must be above 0"),
        ({"max_new_tokens": 20}, "24 learned positions"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name(options, message):
    model = build(position_embedding_type="learned_absolute")
    with pytest.raises(ValueError, match=message):
        generate(model, torch.zeros(1, 7, dtype=torch.int64), **{"max_new_tokens": 2} | options)


def test_prompts_must_have_tokens():
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="`prompts`"):
            left_pad(prompts)

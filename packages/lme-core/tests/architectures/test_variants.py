"""The architectures beside gpt_base: their formulas, caches, slices and settings."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lme_core.config import from_dict, to_dict
from lme_core.flops import count_parameters, flops_per_token
from lme_core.generation import generate, left_pad, next_logits
from lme_core.layers.auxiliary import Auxiliary
from lme_kernels.policy import KernelArgs, KernelPolicy

V, H, LAYERS, D = 61, 32, 4, 8
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = {
    "sequence_mixer_type": "mamba2",
    "state_size": 5,
    "intermediate_size": 24,
    "num_heads": 6,
    "num_groups": 2,
}
GRU = {
    "sequence_mixer_type": "gru",
    "state_head_dim": 6,
    "num_input_heads": 3,
    "num_forget_input_heads": 3,
    "num_reset_input_heads": 3,
    "num_weight_heads": 3,
    "num_forget_weight_heads": 3,
    "num_reset_weight_heads": 3,
    "kernel_size": 3,
    "activation_function": "silu",
    "normalization_function": "rmsnorm",
}
DENSE = {"mlp_type": "MLP", "activation_function": "swiglu", "intermediate_size": 40}
MOE = {
    "mlp_type": "MoE",
    "activation_function": "swiglu",
    "intermediate_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 8,
}
MIXED = {
    "sequence_mixer_blocks": [HEADS, MAMBA, HEADS | {"sliding_window": 4}, GRU],
    "mlp_blocks": [DENSE, MOE, DENSE, MOE],
    "rope_dim": D,
}
PATTERNS = {
    "pairs": [0, 0, 2, 2],
    "one for all": [0, 0, 0, 0],
    "each its own": None,
    "uneven": [0, 1, 1, 1],
}


def configuration(model_type, **fields):
    settings = {
        "model_type": model_type,
        "vocab_size": V,
        "hidden_size": H,
        "num_layers": LAYERS,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "m_residual": 0.7,
        "m_emb": 1.5,
        "m_width": 2.0,
        "sequence_mixer_blocks": [HEADS],
        "mlp_blocks": [DENSE],
    }
    return from_dict(settings | fields)


VARIANTS = {
    "palm": configuration("palm"),
    "palm, mixed": configuration("palm", **MIXED, m_residual=None),
    "ladder": configuration("ladder_residual"),
    "ladder, layernorm": configuration("ladder_residual", normalization_function="layernorm"),
    "ladder, mixed": configuration("ladder_residual", **MIXED),
    "crosslayer": configuration("gpt_crosslayer", sharing_pattern=[0, 0, 2, 2]),
    "crosslayer, mixed": configuration(
        "gpt_crosslayer",
        sharing_pattern=[0, 1, 0, 3],
        m_residual=None,
        **MIXED,
    ),
}


def build(config, dtype=torch.float64, kernels=None):
    model = config.build(KernelPolicy() if kernels is None else kernels).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "A_log" not in name and "dt_bias" not in name:
                # Norms and biases start equal; here each channel counts differently.
                wave = torch.linspace(0, 5, parameter.numel(), dtype=dtype).cos()
                parameter.add_(0.3 * wave)
    return model


def random_batch(rows=2, length=13):
    ids = torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.roll(-1, 1)}


def by_formula(model, batch):
    """Logits by the seed system's formulas, over the model's own mixers and MLPs."""
    c, context = model.config, model.context(batch)
    scale = 1.0 if c.m_residual is None else c.m_residual
    x = model.embedding(batch["input_ids"]) * c.m_emb
    r, a, m = x, None, None
    shared = None
    for name, block in model.blocks.items():
        here = context.at_layer(int(name))
        if c.model_type == "palm":
            u = block.norm(x)
            x = x + scale * (block.sequence_mixer(u, here, None) + block.mlp(u, here)[0])
        elif c.model_type == "ladder_residual":
            r = r if a is None else r + a
            new_a = scale * block.sequence_mixer(block.mixer_norm(r), here, None)
            r = r if m is None else r + m
            new_m = scale * block.mlp(block.mlp_norm(r), here)[0]
            a, m = new_a, new_m
            x = r + a + m
        else:
            mixer = c.mixers()[int(name)]
            u = block.mixer_norm(x)
            if mixer.sequence_mixer_type == "softmax_attention":
                if block.key_value is not None:
                    shared = keys_and_values(block, x, here.rotary)
                y = attention(block, mixer, u, *shared, here.rotary)
            else:
                y = block.sequence_mixer(u, here, None)
            x = x + scale * y
            x = x + scale * block.mlp(block.mlp_norm(x), here)[0]
    return F.linear(model.final_norm(x), model.lm_head.weight) / c.m_width


def rotated(x, rotary):
    cos, sin = (each[:, None] for each in rotary)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def keys_and_values(block, x, rotary):
    rows = F.linear(block.key_value.norm(x), block.key_value.projection.weight)
    key, value = rows.view(*x.shape[:2], -1, 2, D).unbind(-2)
    return rotated(key, rotary), value


def attention(block, mixer, u, key, value, rotary):
    query = F.linear(u, block.sequence_mixer.query.weight).view(*u.shape[:2], -1, D)
    query = rotated(query, rotary)
    heads = []
    distance = torch.arange(u.shape[1])[:, None] - torch.arange(u.shape[1])
    seen = (distance >= 0) & (distance < (mixer.sliding_window or u.shape[1]))
    for head in range(query.shape[2]):
        group = head // (query.shape[2] // key.shape[2])
        scores = query[:, :, head] @ key[:, :, group].transpose(1, 2) / math.sqrt(D)
        scores = scores.masked_fill(~seen, float("-inf"))
        heads.append(scores.softmax(-1) @ value[:, :, group])
    return F.linear(torch.cat(heads, -1), block.sequence_mixer.output.weight)


def gradients(model, loss):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_logits_loss_and_gradients_match_the_formula(config):
    model, batch = build(config), random_batch()
    expected = by_formula(model, batch)
    torch.testing.assert_close(model(batch).logits, expected, rtol=1e-9, atol=1e-11)
    nll = F.cross_entropy(expected.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    ours = model(batch, logits=False).nll_sum
    torch.testing.assert_close(ours, nll, rtol=1e-12, atol=0)
    # Rounding in float64, in sums over tokens and layers.
    its = gradients(model, nll)
    for name, gradient in gradients(model, ours).items():
        torch.testing.assert_close(gradient, its[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_layers_share_keys_and_values_as_the_pattern_says(pattern):
    config = configuration("gpt_crosslayer", sharing_pattern=pattern)
    model, batch = build(config), random_batch()
    owners = set(pattern or range(LAYERS))
    assert {int(n) for n, block in model.blocks.items() if block.key_value is not None} == owners
    torch.testing.assert_close(model(batch).logits, by_formula(model, batch), rtol=1e-9, atol=1e-11)
    # A block without keys of its own lacks their norm and both projections.
    missing = (LAYERS - len(owners)) * (H + 2 * 2 * D * H)
    everyone = count_parameters(configuration("gpt_crosslayer"))
    assert count_parameters(config).total == everyone.total - missing


FEATURES = {
    "gate, exclusive": {"attention_gate": True, "exclusive_self_attention": True},
    "norms, biases": {"qk_norm": True, "add_bias": True},
    "softcap, sinks": {"attention_softcap": 0.7, "attention_sinks": True},
    "one key-value head": {"num_key_value_heads": 1},
    "no rotation": {},
}


# With keys and values of one layer's own, cross-layer attention is plain attention whose keys and
# values come from another norm: with equal norms both models are the same.
@pytest.mark.parametrize("name", FEATURES)
def test_without_sharing_every_feature_is_that_of_softmax_attention(name):
    fields = {
        "sequence_mixer_blocks": [HEADS | FEATURES[name]],
        "position_embedding_type": "nope" if name == "no rotation" else "rope",
    }
    shared = build(configuration("gpt_crosslayer", **fields))
    plain = build(configuration("gpt_base", **fields))
    source = dict(plain.named_parameters())
    K, parts = (
        FEATURES[name].get("num_key_value_heads", 2),
        2 if "attention_gate" in FEATURES[name] else 1,
    )
    G = 4 // K
    with torch.no_grad():
        for path, parameter in shared.named_parameters():
            layer = ".".join(path.split(".")[:2])
            if path in source:
                parameter.copy_(source[path])
            elif "key_value.norm" in path:
                parameter.copy_(source[f"{layer}.mixer_norm.weight"])
            elif "key_norm" in path:
                parameter.copy_(source[f"{layer}.sequence_mixer.key_norm.weight"])
            else:
                kind = path.rpartition(".")[2]
                rows = source[f"{layer}.sequence_mixer.qkv.{kind}"].unflatten(0, (K, -1, D))
                if "query" in path:
                    order = [*range(G), *(range(G + 2, 2 * G + 2) if parts == 2 else ())]
                else:
                    order = [G, G + 1]
                parameter.copy_(rows[:, order].flatten(0, 2))
    batch = random_batch()
    expected = plain(batch).logits
    torch.testing.assert_close(shared(batch).logits, expected, rtol=1e-9, atol=1e-11)


CACHED = {name: VARIANTS[name] for name in VARIANTS if name != "ladder, layernorm"}


@pytest.mark.parametrize("config", CACHED.values(), ids=CACHED)
@pytest.mark.parametrize("pieces", [[7] + [1] * 4, [2, 6, 3]], ids=str)
def test_cached_logits_are_those_without_a_cache(config, pieces):
    model = build(config)
    ids = random_batch(3, sum(pieces))["input_ids"]
    expected = model({"input_ids": ids}).logits
    cache = model.new_cache(3, sum(pieces))
    with torch.no_grad():
        got = [model({"input_ids": each}, cache=cache).logits for each in ids.split(pieces, 1)]
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("config", CACHED.values(), ids=CACHED)
def test_padded_prompts_generate_what_they_generate_alone(config):
    model = build(config)
    prompts = [[5, 6, 7, 8, 9], [3, 4], [1]]
    ids, valid = left_pad(prompts, pad_token_id=0)
    together = generate(model, ids, valid=valid, max_new_tokens=6, temperature=0)
    for prompt, row in zip(prompts, together, strict=True):
        alone = generate(model, torch.tensor([prompt]), max_new_tokens=6, temperature=0)
        assert alone[0].tolist() == row.tolist()


def test_rows_of_a_shared_cache_can_be_reordered():
    model = build(VARIANTS["crosslayer"])
    ids = random_batch(3, 6)["input_ids"]
    rows = torch.tensor([2, 0, 0])
    cache = model.new_cache(3, 7)
    next_logits(model, {"input_ids": ids}, cache)
    cache.reorder(rows)
    token = torch.tensor([[7], [8], [9]])
    got = next_logits(model, {"input_ids": token}, cache)
    expected = model({"input_ids": torch.cat((ids[rows], token), 1)}).logits[:, -1]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_slices_at_every_layer_make_the_whole(config):
    model, batch = build(config), random_batch()
    whole = model(batch, logits=False)
    for cut in range(1, LAYERS):
        first, last = copy.deepcopy(model), copy.deepcopy(model)
        for layer in range(LAYERS):
            del (last if layer < cut else first).blocks[str(layer)]
        tensors, before = first.forward_part(batch, None, range(cut), is_last=False, logits=False)
        assert all(each.shape[:2] == batch["input_ids"].shape for each in tensors)
        _, after = last.forward_part(batch, tensors, range(cut, LAYERS), is_last=True, logits=False)
        assert torch.equal(after.nll_sum, whole.nll_sum)
        for name in whole_losses(after):
            total = after.auxiliary[name] + before.auxiliary.get(name, 0.0)
            torch.testing.assert_close(total, whole.auxiliary[name], rtol=1e-12, atol=0)
        merged = {**before.auxiliary, **after.auxiliary}
        for name in whole.auxiliary.keys() - whole_losses(whole):
            assert torch.equal(merged[name], whole.auxiliary[name])


def whole_losses(outputs):
    return {name for name in outputs.auxiliary if "." not in name}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_blocks_can_be_recomputed(config):
    model, batch = build(config), random_batch()
    losses = []
    for recomputes in (False, True):
        context, stream, total = model.context(batch), model.embed(batch), 0.0
        for name, block in model.blocks.items():
            inputs = (stream, context.at_layer(int(name)), None)
            if recomputes:
                stream, auxiliary = checkpoint(block, *inputs, use_reentrant=False)
            else:
                stream, auxiliary = block(*inputs)
            assert isinstance(auxiliary, Auxiliary)
            total = total + sum(auxiliary.losses.values())
        losses.append(model.head(stream, batch["labels"]).nll_sum + total)
    assert torch.equal(*losses)
    its = gradients(model, losses[0])
    for name, gradient in gradients(model, losses[1]).items():
        torch.testing.assert_close(gradient, its[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("config", [VARIANTS["ladder"], VARIANTS["crosslayer"]], ids=["l", "c"])
def test_blocks_compile_whole(config):
    torch.compiler.reset()
    model, batch = build(config), random_batch()
    expected = model(batch, logits=False).nll_sum
    its = gradients(model, expected)
    for block in model.blocks.values():
        block.compile(backend="aot_eager", fullgraph=True)
    nll = model(batch, logits=False).nll_sum
    torch.testing.assert_close(nll, expected, rtol=1e-12, atol=0)
    for name, gradient in gradients(model, nll).items():
        torch.testing.assert_close(gradient, its[name], rtol=1e-9, atol=1e-11)


def test_packed_documents_do_not_see_each_other():
    config = VARIANTS["crosslayer"]
    model = build(config)
    ids = random_batch(1, 12)["input_ids"]
    packed = {
        "input_ids": ids,
        "cu_seqlens": torch.tensor([0, 5, 12], dtype=torch.int32),
        "position_ids": torch.tensor([[*range(5), *range(7)]]),
    }
    alone = [model({"input_ids": part}).logits for part in ids.split([5, 7], 1)]
    torch.testing.assert_close(model(packed).logits, torch.cat(alone, 1), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_configs_survive_a_file(config):
    assert from_dict(to_dict(config)) == config


def test_parts_that_write_to_the_stream_start_smaller():
    config = configuration("gpt_crosslayer", sharing_pattern=[0, 0, 2, 2], initializer_range=0.1)
    with torch.device("meta"):
        model = config.build(KernelPolicy())
    deep = 0.1 / math.sqrt(2 * LAYERS)
    stds = {
        "blocks.0.key_value.projection.weight": 0.1,
        "blocks.1.sequence_mixer.query.weight": 0.1,
        "blocks.1.sequence_mixer.output.weight": deep,
        "blocks.1.mlp.down.weight": deep,
    }
    for name, std in stds.items():
        # About a thousand numbers: a tenth is four standard errors and more.
        assert model.initial_value(name).std().item() == pytest.approx(std, rel=0.1), name


def test_shared_keys_cost_no_products():
    S, measured = 16, {}
    for pattern in ([0, 0, 2, 2], None):
        config = configuration("gpt_crosslayer", sharing_pattern=pattern)
        measured[str(pattern)] = flops_per_token(config, S)
    assert measured["None"] - measured["[0, 0, 2, 2]"] == 3 * 2 * 2 * H * 2 * 2 * D
    base = flops_per_token(configuration("gpt_base"), S)
    assert measured["None"] == base
    assert flops_per_token(configuration("palm"), S) == base
    assert flops_per_token(configuration("ladder_residual"), S) == base


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sharing_pattern": [0, 0, 2]}, r"must have `num_layers` \(4\) entries, got 3"),
        ({"sharing_pattern": [1, 1, 2, 3]}, r"`sharing_pattern\[0\]` must be 0"),
        ({"sharing_pattern": [0, 1, 0, 3]}, r"`sharing_pattern\[2\]` must be 2.* or 1,.*got 0"),
        ({"sharing_pattern": [0, 2, 2, 2]}, r"`sharing_pattern\[1\]` must be 1.*got 2"),
        (
            {
                "sharing_pattern": [0, 0, 2, 3],
                "sequence_mixer_blocks": [HEADS, GRU, HEADS, HEADS],
                "rope_dim": D,
            },
            r"`sharing_pattern\[1\]` must be 1: the layer has no softmax attention",
        ),
        (
            {
                "sharing_pattern": [0, 0, 2, 3],
                "sequence_mixer_blocks": [HEADS, HEADS | {"num_key_value_heads": 4}, HEADS, HEADS],
            },
            r"must agree on `num_key_value_heads` and head size, got \(4, 8\) and \(2, 8\)",
        ),
    ],
    ids=str,
)
def test_a_wrong_pattern_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        configuration("gpt_crosslayer", **fields)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_references_alone_give_the_same(config):
    batch = random_batch()
    expected = build(config)(batch).logits
    plain = build(config, kernels=KernelPolicy.from_args(KernelArgs(kernels=[])))
    torch.testing.assert_close(plain(batch).logits, expected, rtol=1e-9, atol=1e-11)

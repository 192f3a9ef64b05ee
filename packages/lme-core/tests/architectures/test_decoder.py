import copy
import shutil
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lme_core.architectures.decoder import parameter_traits
from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.architectures.stream import Stream
from lme_core.layers.dropout import dropout
from lme_core.mixers.softmax_attention import SoftmaxAttentionConfig
from lme_core.mlps.dense import DenseMLPConfig
from lme_kernels.policy import KernelPolicy

B, S, V = 2, 12, 61
CONFIG = GPTBaseConfig(
    vocab_size=V,
    hidden_size=32,
    num_layers=2,
    max_position_embeddings=16,
    initializer_range=0.2,
    sequence_mixer_blocks=(SoftmaxAttentionConfig(num_attention_heads=4, num_key_value_heads=2),),
    mlp_blocks=(DenseMLPConfig(activation_function="swiglu", intermediate_size=40),),
)


def build(config=CONFIG, dtype=torch.float64):
    return config.build(KernelPolicy()).to(dtype)


def random_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, S), generator=generator)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    labels[0, 3] = -100
    return {"input_ids": ids, "labels": labels}


def training_batch(seed=0):
    extra = {
        "token_index": torch.arange(B * S).view(B, S),
        "dropout_key": torch.tensor(77),
    }
    return random_batch(seed) | extra


def gradients(model, batch):
    loss = model(batch, logits=False).nll_sum
    return loss.detach(), dict(
        zip(
            (name for name, _ in model.named_parameters()),
            torch.autograd.grad(loss, list(model.parameters())),
            strict=True,
        )
    )


def test_parameter_names_and_shapes_are_the_documented_ones():
    bias = replace(
        CONFIG,
        position_embedding_type="learned_absolute",
        normalization_function="layernorm",
        sequence_mixer_blocks=(
            SoftmaxAttentionConfig(num_attention_heads=4, num_key_value_heads=2, add_bias=True),
        ),
        mlp_blocks=(
            DenseMLPConfig(activation_function="swiglu", intermediate_size=40),
            DenseMLPConfig(intermediate_size=24, add_bias=True),
        ),
    )
    shapes = {name: tuple(p.shape) for name, p in build(bias).named_parameters()}
    block = {
        "mixer_norm.weight": (32,),
        "mixer_norm.bias": (32,),
        "sequence_mixer.qkv.weight": (64, 32),
        "sequence_mixer.qkv.bias": (64,),
        "sequence_mixer.output.weight": (32, 32),
        "sequence_mixer.output.bias": (32,),
        "mlp_norm.weight": (32,),
        "mlp_norm.bias": (32,),
    }
    assert shapes == {
        "embedding.weight": (V, 32),
        "position_embedding.weight": (16, 32),
        **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()},
        "blocks.0.mlp.gate_up.weight": (80, 32),
        "blocks.0.mlp.down.weight": (32, 40),
        "blocks.1.mlp.up.weight": (24, 32),
        "blocks.1.mlp.up.bias": (24,),
        "blocks.1.mlp.down.weight": (32, 24),
        "blocks.1.mlp.down.bias": (32,),
        "final_norm.weight": (32,),
        "final_norm.bias": (32,),
        "lm_head.weight": (V, 32),
    }
    assert not list(build(bias).named_buffers())
    assert "lm_head.weight" not in build(replace(CONFIG, tie_word_embeddings=True)).state_dict()


def test_traits_mark_matrices_of_blocks_and_spare_norms_and_biases():
    config = replace(
        CONFIG,
        position_embedding_type="learned_absolute",
        sequence_mixer_blocks=(SoftmaxAttentionConfig(num_attention_heads=4, add_bias=True),),
        mlp_blocks=(DenseMLPConfig(activation_function="preglu", add_bias=True),),
    )
    traits = parameter_traits(build(config))
    mup = {name for name, trait in traits.items() if trait.mup}
    plain = {name for name, trait in traits.items() if not trait.weight_decay}
    layers = ("sequence_mixer.qkv", "sequence_mixer.output", "mlp.gate_up", "mlp.down")
    assert mup == {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}
    assert plain == {
        *(f"blocks.{i}.{layer}.bias" for i in range(2) for layer in layers),
        *(f"blocks.{i}.{norm}.weight" for i in range(2) for norm in ("mixer_norm", "mlp_norm")),
        *(f"blocks.{i}.mlp.activation.weight" for i in range(2)),
        "final_norm.weight",
    }
    assert traits.keys() == build(config).state_dict().keys()


@pytest.mark.parametrize("m_width", [None, 4.0])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_without_logits_is_that_of_the_logits(tied, m_width):
    model = build(replace(CONFIG, tie_word_embeddings=tied, m_width=m_width))
    batch = random_batch()
    outputs = model(batch)
    expected = F.cross_entropy(
        outputs.logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"
    )
    nll, got = gradients(model, batch)
    assert outputs.nll_sum is None
    assert outputs.auxiliary == {}
    # Rounding in float64 only.
    torch.testing.assert_close(nll, expected, rtol=1e-12, atol=0)
    reference = torch.autograd.grad(expected, list(model.parameters()))
    for gradient, its in zip(got.values(), reference, strict=True):
        torch.testing.assert_close(gradient, its, rtol=1e-9, atol=1e-12)


def reference_forward(model, batch, c):
    """The architecture written out, over the model's own parts."""
    x = F.embedding(batch["input_ids"], model.embedding.weight)
    if c.position_embedding_type == "learned_absolute":
        x = x + model.position_embedding.weight[batch["position_ids"]]
    x = dropout(x, c.embedding_dropout, batch["dropout_key"], 0, batch["token_index"])
    x = x * c.m_emb
    for i, block in enumerate(model.blocks.values()):
        context = model.context(batch).at_layer(i)
        x = x + c.m_residual * block.sequence_mixer(block.mixer_norm(x), context, None)
        x = x + c.m_residual * block.mlp(block.mlp_norm(x), context)[0]
    return F.linear(model.final_norm(x), model.lm_head.weight) / c.m_width


@pytest.mark.parametrize("positions", ["rope", "learned_absolute", "nope"])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "p_norm"])
def test_multipliers_norms_positions_and_dropouts_are_where_they_belong(positions, norm):
    mixers = (
        replace(CONFIG.mixers()[0], dropout=0.2, sliding_window=3),
        replace(CONFIG.mixers()[0], softmax_dropout=0.2, attention_gate=True),
    )
    config = replace(
        CONFIG,
        position_embedding_type=positions,
        normalization_function=norm,
        m_emb=3.0,
        m_residual=0.3,
        m_width=2.0,
        embedding_dropout=0.1,
        sequence_mixer_blocks=mixers,
        mlp_blocks=(replace(CONFIG.mlps()[0], dropout=0.3),),
    )
    model = build(config)
    batch = training_batch() | {"position_ids": torch.randint(0, 16, (B, S))}
    logits, expected = model(batch).logits, reference_forward(model, batch, config)
    # Rounding in float64 only.
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    evaluation = {name: t for name, t in batch.items() if name != "dropout_key"}
    assert not torch.allclose(model(evaluation).logits, logits)


def test_given_positions_that_count_up_change_nothing():
    for positions in ("rope", "learned_absolute"):
        model = build(replace(CONFIG, position_embedding_type=positions))
        batch = random_batch()
        given = batch | {"position_ids": torch.arange(S).expand(B, S)}
        assert torch.equal(model(given).logits, model(batch).logits)


def test_dropout_does_not_depend_on_how_the_batch_is_cut():
    config = replace(
        CONFIG,
        embedding_dropout=0.1,
        sequence_mixer_blocks=(replace(CONFIG.mixers()[0], dropout=0.2, softmax_dropout=0.1),),
        mlp_blocks=(replace(CONFIG.mlps()[0], dropout=0.3),),
    )
    model = build(config)
    batch = training_batch()
    key = batch.pop("dropout_key")
    whole = model(batch | {"dropout_key": key}).logits
    rows = [
        model({name: t[i : i + 1] for name, t in batch.items()} | {"dropout_key": key}).logits
        for i in range(B)
    ]
    # Products of other shapes: rounding in float64.
    torch.testing.assert_close(torch.cat(rows), whole, rtol=1e-10, atol=1e-12)


def test_a_model_without_dropout_makes_no_keys():
    model = build()
    batch = training_batch()
    assert model.context(batch).dropout_key is None
    assert torch.equal(model(batch).logits, model(random_batch()).logits)


@pytest.mark.parametrize("window", [None, 4])
def test_a_document_does_not_feel_its_neighbour(window):
    config = replace(
        CONFIG, sequence_mixer_blocks=(replace(CONFIG.mixers()[0], sliding_window=window),)
    )
    model = build(config, torch.float32)
    bounds = torch.tensor([0, 5, 12, 12, 20, 24], dtype=torch.int32)
    batch = random_batch() | {"cu_seqlens": bounds}
    batch["position_ids"] = torch.tensor([[*range(5), *range(7)], [*range(8), *range(4)]])
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    # Another first document in both rows.
    changed["input_ids"][0, :5] = (batch["input_ids"][0, :5] + 1) % V
    changed["input_ids"][1, :8] = (batch["input_ids"][1, :8] + 1) % V
    kept = torch.zeros(B, S, dtype=torch.bool)
    kept[0, 5:] = kept[1, 8:] = True
    seen = []
    for each in (batch, changed):
        x = model.embed(each).x.detach().requires_grad_()
        y, _ = model.run_blocks(Stream(x), model.context(each))
        logits = model.head(y).logits
        labels = each["labels"].masked_fill(~kept, -100)
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        (grad,) = torch.autograd.grad(nll, x)
        seen.append((logits[kept], grad[kept]))
        # Nothing flows into a document from the loss of another.
        assert not grad[~kept].any()
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_packing_gives_the_logits_of_each_document_alone():
    model = build()
    ids = random_batch()["input_ids"]
    packed = {
        "input_ids": ids,
        "cu_seqlens": torch.tensor([0, 5, 12, 24], dtype=torch.int32),
        "position_ids": torch.tensor([[*range(5), *range(7)], [*range(12)]]),
    }
    got = model(packed).logits
    alone = [ids[:1, :5], ids[:1, 5:], ids[1:]]
    expected = torch.cat([model({"input_ids": each}).logits.flatten(0, 1) for each in alone])
    # Products of other shapes: rounding in float64.
    torch.testing.assert_close(got.flatten(0, 1), expected, rtol=1e-10, atol=1e-12)


def test_right_padding_changes_nothing_before_it_and_left_padding_is_refused():
    model = build()
    batch = random_batch()
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[0, 8:] = False
    padded = batch | {"input_ids": batch["input_ids"].masked_fill(~valid, 0), "valid": valid}
    got, expected = model(padded).logits, model(batch).logits
    torch.testing.assert_close(got[valid], expected[valid], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="`valid` has rows padded on the left"):
        model(batch | {"valid": valid.flip(1)})


def test_a_row_may_be_all_padding():
    # As where rows are cut over devices, and one has what is behind their end.
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[0] = False
    batch = random_batch()
    assert torch.equal(build()(batch | {"valid": valid}).logits, build()(batch).logits)


def test_stages_of_a_pipeline_make_the_whole():
    config = replace(
        CONFIG,
        num_layers=4,
        embedding_dropout=0.1,
        mlp_blocks=(replace(CONFIG.mlps()[0], dropout=0.3),),
    )
    whole = build(config)
    first, last = stages(whole, [(0, 1), (2, 3)])
    batch = training_batch()
    tensors, before = first.forward_part(batch, None, (0, 1), is_last=False, logits=False)
    assert before.logits is None
    assert before.nll_sum == 0
    nothing, after = last.forward_part(batch, tensors, (2, 3), is_last=True, logits=False)
    assert nothing == ()
    assert torch.equal(after.nll_sum, whole(batch, logits=False).nll_sum)
    with pytest.raises(ValueError, match="losses, not logits"):
        last.forward_part(batch, tensors, (2, 3), is_last=True)


def stages(whole, layers):
    """Copies without what `part_ends` says that a stage does not need."""
    ends = whole.part_ends()
    made = []
    for index, kept in enumerate(layers):
        part = copy.deepcopy(whole)
        needed = {*(ends[0] if index == 0 else ()), *(ends[1] if index == len(layers) - 1 else ())}
        for name in {*ends[0], *ends[1]} - needed:
            setattr(part, name, None)
        for layer in set(part.blocks) - {str(each) for each in kept}:
            del part.blocks[layer]
        made.append(part)
    return made


@pytest.mark.parametrize("tied", [False, True])
def test_the_work_of_parts_is_two_operations_for_each_element_of_their_matrices(tied):
    model = build(replace(CONFIG, tie_word_embeddings=tied))
    embedding, blocks, head = model.part_costs()
    assert head == 2 * model.embedding.weight.numel()
    assert embedding < head
    attention, mlp = model.blocks["0"].sequence_mixer, model.blocks["0"].mlp
    matrices = [each for part in (attention, mlp) for each in part.parameters() if each.ndim == 2]
    # One key is all that a token of a sequence of one sees.
    scores = 4 * CONFIG.hidden_size
    assert blocks[0] == 2 * sum(each.numel() for each in matrices) + scores
    assert model.part_ends()[1][1] == ("embedding" if tied else "lm_head")


COMPILED = {
    "plain": ({}, False),
    "qk norm, window, packed": ({"qk_norm": True, "sliding_window": 4}, True),
    "gate, exclusive, dropout": (
        {"attention_gate": True, "exclusive_self_attention": True, "dropout": 0.2},
        False,
    ),
    "softmax dropout, packed": ({"softmax_dropout": 0.2}, True),
}


@pytest.mark.parametrize(("fields", "packed"), COMPILED.values(), ids=COMPILED)
def test_blocks_compile_whole_and_once_for_all_layers(fields, packed):
    torch.compiler.reset()
    config = replace(
        CONFIG,
        num_layers=3,
        sequence_mixer_blocks=(replace(CONFIG.mixers()[0], **fields),),
    )
    model = build(config)
    batch = training_batch()
    if packed:
        batch["cu_seqlens"] = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
        batch["position_ids"] = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    nll, expected = gradients(model, batch)
    for block in model.blocks.values():
        block.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled_nll, got = gradients(model, batch)
    # The compiler may split an operation into others: rounding in float64.
    torch.testing.assert_close(compiled_nll, nll, rtol=1e-12, atol=0)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


# Masks are integer arithmetic beyond 64 bits, of which a compiler may make something else.
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ on the path, found none")
def test_inductor_makes_the_same_masks():
    torch.compiler.reset()
    drops = replace(CONFIG.mixers()[0], dropout=0.2, softmax_dropout=0.2)
    model = build(replace(CONFIG, num_layers=1, sequence_mixer_blocks=(drops,)))
    batch = training_batch()
    nll, expected = gradients(model, batch)
    model.blocks["0"].compile(fullgraph=True)
    compiled_nll, got = gradients(model, batch)
    # Rounding in float64: another mask would show in the first digits.
    torch.testing.assert_close(compiled_nll, nll, rtol=1e-12, atol=0)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


def test_a_block_can_be_recomputed():
    model = build(replace(CONFIG, mlp_blocks=(replace(CONFIG.mlps()[0], dropout=0.3),)))
    batch = training_batch()
    _, expected = gradients(model, batch)
    context = model.context(batch)
    assert context.dropout_key is not None
    x = model.embed(batch)
    for name, block in model.blocks.items():
        x, _ = torch.utils.checkpoint.checkpoint(
            block, x, context.at_layer(int(name)), None, use_reentrant=False
        )
    nll = model.head(x, batch["labels"]).nll_sum
    got = torch.autograd.grad(nll, list(model.parameters()))
    for gradient, its in zip(got, expected.values(), strict=True):
        assert torch.equal(gradient, its)


def test_bfloat16_stays_close_to_float32():
    fine, coarse = build(CONFIG, torch.float32), build(CONFIG, torch.bfloat16)
    batch = random_batch()
    nll = fine(batch, logits=False).nll_sum
    rough = coarse(batch, logits=False).nll_sum
    assert coarse(batch).logits.dtype == torch.bfloat16
    assert rough.dtype == torch.float32
    # Eight bits of mantissa through two layers: measured 0.1 %, ten times that is a mistake.
    assert abs(rough - nll) / nll < 0.01


def test_learned_positions_end():
    model = build(replace(CONFIG, position_embedding_type="learned_absolute"))
    with pytest.raises(ValueError, match=r"17 tokens passes `max_position_embeddings` \(16\)"):
        model({"input_ids": torch.zeros(1, 17, dtype=torch.int64)})

"""Random small models of transformers, through files on disk: logits, loss and all gradients.

Gradients come back the way the weights went: a copy of the model that holds them is saved and read
through the same rules, which only rearrange.
"""

from contextlib import contextmanager

import pytest
import torch
import transformers
from torch.nn import functional as F

from lme_cli.certifying import build_for_certificate
from lme_convert.api import export_to_hf, import_from_hf, open_model
from lme_core.config import from_dict
from lme_core.generation import left_pad, next_logits
from lme_kernels.policy import KernelPolicy

B, S, V = 2, 19, 71
SIZES = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 10, "sliding_window": 5, "rms_norm_eps": 1e-4}
MAMBA = {
    "num_heads": 6,
    "head_dim": 8,
    "n_groups": 3,
    "state_size": 5,
    "chunk_size": 8,
    "layer_norm_epsilon": 1e-4,
}
HYBRID = {
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 6,
    "mamba_n_groups": 2,
    "mamba_d_state": 5,
    "mamba_chunk_size": 8,
    "num_local_experts": 4,
    "intermediate_size": 12,
    "shared_intermediate_size": 20,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.3,
    "rms_norm_eps": 1e-4,
}
NEXT = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "rms_norm_eps": 1e-4,
}
CASES = {
    "olmo2": ("olmo2", {}),
    "olmo2, biases, yarn": (
        "olmo2",
        {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-4,
            "rope_parameters": YARN,
        },
    ),
    "gemma2": ("gemma2", GEMMA),
    "gemma2, tight bounds, untied": (
        "gemma2",
        GEMMA
        | {
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA | {"num_hidden_layers": 3, "sliding_window_pattern": 3},
    ),
    "gemma3, scaled, bounded": (
        "gemma3_text",
        GEMMA
        | {
            "final_logit_softcapping": 2.0,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        },
    ),
    "mamba2": ("mamba2", MAMBA),
    "mamba2, biases, limits, tied": (
        "mamba2",
        MAMBA
        | {
            "use_bias": True,
            "use_conv_bias": False,
            "time_step_limit": [0.006, 0.011],
            "tie_word_embeddings": True,
        },
    ),
    "granitemoehybrid": ("granitemoehybrid", HYBRID),
    "granitemoehybrid, dense, rope": (
        "granitemoehybrid",
        HYBRID
        | {
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "mamba_proj_bias": True,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_next": ("qwen3_next", NEXT),
    "qwen3_next, dense layer, biases": (
        "qwen3_next",
        NEXT
        | {
            "mlp_only_layers": [0],
            "attention_bias": True,
            "norm_topk_prob": False,
            "linear_num_key_heads": 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
}


@contextmanager
def casts_lifted(dtype):
    """Make transformers' own casts to float32 casts to `dtype`."""
    with pytest.MonkeyPatch.context() as patch:
        if dtype != torch.float32:
            patch.setattr(torch, "float32", dtype)
            patch.setattr(torch, "float", dtype)
            patch.setattr(torch.Tensor, "float", lambda x: x.to(dtype))
        yield


def their_model(case, dtype):
    model_type, fields = CASES[case]
    config = transformers.AutoConfig.for_model(model_type, **SIZES | fields)
    # Imported before a cast is lifted: modules read the names of dtypes once.
    kind = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with casts_lifted(dtype):
            model = kind(config).to(dtype).train()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        # Norms and biases start at one and zero, which would hide a mistake.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if name.endswith("A_log"):
                # What is forgotten at once has gradients that are rounding.
                parameter.sub_(2.0)
    return model


def our_model(source, dtype):
    opened = open_model(str(source))
    model = from_dict(opened.config).build(KernelPolicy()).to(dtype)
    model.load_state_dict({name: opened[name] for name in opened.names}, strict=True)
    return model


def save_gradients(model, path):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(path)


def relative(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


# float64 with the other side's casts lifted, relative to the largest value: rounding. float32 with
# transformers untouched: a few hundred roundings of 6e-8.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_agree(case, dtype, tolerance, tmp_path):
    ids = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1).masked_fill(torch.arange(S) == S - 1, -100)
    theirs = their_model(case, dtype)
    theirs.save_pretrained(tmp_path / "weights")
    with casts_lifted(dtype):
        expected = theirs(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
        loss.backward()
    save_gradients(theirs, tmp_path / "gradients")
    ours = our_model(tmp_path / "weights", dtype)
    batch = {"input_ids": ids, "labels": labels}
    assert relative(ours(batch).logits, expected) < tolerance
    nll = ours(batch, logits=False).nll_sum
    assert relative(nll, loss) < tolerance
    nll.backward()
    gradients = open_model(str(tmp_path / "gradients"))
    named = dict(ours.named_parameters())
    assert set(gradients.names) == set(named)
    for name, parameter in named.items():
        assert relative(parameter.grad, gradients[name]) < tolerance, name


@pytest.mark.parametrize("case", CASES)
def test_left_padded_prompts_give_what_each_gives_alone(case, tmp_path):
    """Alone, because padding reaches the biases of transformers' own recurrent layers."""
    theirs = their_model(case, torch.float64).eval()
    theirs.save_pretrained(tmp_path / "weights")
    prompts = [[5, 6, 7, 8, 9], [3, 4], [10, 11, 12, 13, 14, 15, 16]]
    with torch.no_grad(), casts_lifted(torch.float64):
        rows = [theirs(input_ids=torch.tensor([each]), use_cache=False) for each in prompts]
    expected = torch.cat([row.logits[:, -1] for row in rows])
    ids, valid = left_pad(prompts)
    ours = our_model(tmp_path / "weights", torch.float64).eval()
    got = next_logits(ours, {"input_ids": ids, "valid": valid}, ours.new_cache(3, 7))
    assert relative(got, expected) < 1e-9


@pytest.mark.parametrize("case", CASES)
def test_both_ways_are_certified_with_the_built_model(case, tmp_path):
    their_model(case, torch.float32).save_pretrained(tmp_path / "theirs")
    steps = [(import_from_hf, "theirs", "ours"), (export_to_hf, "ours", "back")]
    for convert, source, destination in steps:
        certificate = convert(
            tmp_path / source, tmp_path / destination, build_model=build_for_certificate
        )
        assert certificate.status == "certified"
        assert certificate.first_differing_layer is None

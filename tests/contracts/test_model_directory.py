"""What lme-convert writes is what lme-core builds and computes: every family, the whole way."""

import pytest
import torch
import transformers

from lme_cli.certifying import build_for_certificate
from lme_convert.api import import_from_hf, open_model
from lme_convert.families import FAMILIES, expected_parameters
from lme_core.config import from_dict
from lme_kernels.policy import KernelPolicy

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What a family does not take of these, or has more of.
OWN_SIZES = {
    # Its latent attention has as many key heads as query heads.
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 6,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mamba2": {"num_heads": 6, "head_dim": 8, "state_size": 8, "n_groups": 1},
}


@pytest.fixture(params=sorted(FAMILIES))
def source(request, tmp_path):
    """A small random model of the family, as transformers saves it."""
    config = transformers.AutoConfig.for_model(
        request.param, **SIZES | OWN_SIZES.get(request.param, {})
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source", model.float().eval()


def test_names_and_shapes_of_an_import_are_those_of_the_built_model(source, tmp_path):
    path, _ = source
    import_from_hf(str(path), str(tmp_path / "ours"))
    opened = open_model(str(tmp_path / "ours"))
    with torch.device("meta"):
        model = from_dict(opened.config).build(KernelPolicy())
    # Parameters, and buffers that are saved: the bias by which experts are chosen.
    built = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    assert built == dict(expected_parameters(opened.config))
    assert set(opened.names) == set(built)
    for name, shape in built.items():
        assert tuple(opened.tensor(name).shape) == shape


def test_the_built_model_gives_the_logits_of_the_source(source, tmp_path):
    path, theirs = source
    import_from_hf(str(path), str(tmp_path / "ours"))
    opened = open_model(str(tmp_path / "ours"))
    tensors = {name: opened.tensor(name) for name in opened.names}
    ours = build_for_certificate(opened.config, tensors)
    ids = torch.randint(SIZES["vocab_size"], (2, 17))
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
    # fp32 sums in another order: the bound for parity with transformers untouched.
    torch.testing.assert_close(ours.logits(ids), expected, rtol=0.0, atol=1e-5)

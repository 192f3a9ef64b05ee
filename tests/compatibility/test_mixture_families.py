"""Models with mixtures of experts: converted on disk, they compute what transformers computes."""

import json
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from lme_cli.certifying import build_for_certificate
from lme_convert.api import export_to_hf, import_from_hf, open_model
from lme_core.config import from_dict
from lme_core.generation import left_pad, next_logits
from lme_kernels.policy import KernelPolicy

B, S, V = 2, 19, 71
BASE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "rms_norm_eps": 1e-4,
}
QWEN = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
GRANITE = {
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.3,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "n_shared_experts": 2,
    "kv_lora_rank": 10,
    "q_lora_rank": 9,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
CASES = {
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral, window": (
        "mixtral",
        {"num_local_experts": 3, "sliding_window": 7, "head_dim": 12, "tie_word_embeddings": True},
    ),
    "qwen2_moe": ("qwen2_moe", QWEN | {"shared_expert_intermediate_size": 20}),
    "qwen2_moe, dense layer, windows": (
        "qwen2_moe",
        QWEN
        | {
            "shared_expert_intermediate_size": 20,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "qwen3_moe": ("qwen3_moe", QWEN | {"head_dim": 6, "norm_topk_prob": True}),
    "qwen3_moe, dense layer": (
        "qwen3_moe",
        QWEN | {"decoder_sparse_step": 2, "attention_bias": True},
    ),
    "granitemoe": ("granitemoe", GRANITE | {"attention_bias": True}),
    "granitemoeshared": ("granitemoeshared", GRANITE | {"shared_intermediate_size": 20}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "deepseek_v3, plain queries, yarn": (
        "deepseek_v3",
        DEEPSEEK
        | {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
            "rope_parameters": YARN,
        },
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that saves a random model of a case, once: its directory."""
    made = {}

    def save(case):
        if case not in made:
            model_type, fields = CASES[case]
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(model_type, **(BASE | fields)), dtype=torch.float32
            )
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                    if "norm" in name:
                        tensor.normal_(1.0, 0.2, generator=generator)
                    elif "inv_freq" not in name:
                        tensor.normal_(0.0, 0.2, generator=generator)
            made[case] = tmp_path_factory.mktemp("models") / "theirs"
            model.save_pretrained(made[case])
        return made[case]

    return save


@contextmanager
def casts_lifted(dtype):
    """Make transformers' own casts to float32 casts to `dtype`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", dtype)
        patch.setattr(torch, "float", dtype)
        patch.setattr(torch.Tensor, "float", lambda x: x.to(dtype))
        yield


def their_model(path, dtype):
    """Their model of a directory; frequencies of rotation, which no file holds, in `dtype` too."""
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with casts_lifted(dtype):
        model = AutoModelForCausalLM.from_config(
            loaded.config, attn_implementation="eager", experts_implementation="eager"
        ).to(dtype)
    model.load_state_dict(loaded.state_dict())
    return model


def our_model(opened, dtype):
    """Our model of an opened directory, its tensors in full."""
    config = {key: value for key, value in opened.config.items() if key != "format_version"}
    model = from_dict(config).build(KernelPolicy()).to(dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in opened.items()}, strict=True)
    return model


def relative(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


# float64 with the other side's casts lifted, relative to the largest value: rounding. float32 with
# transformers untouched: a few hundred roundings of 6e-8.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@every_case
def test_logits_loss_and_gradients_agree(case, dtype, tolerance, saved, tmp_path):
    path = saved(case)
    ours = our_model(open_model(path), dtype)
    ids = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1).masked_fill(torch.arange(S) == S - 1, -100)
    theirs = their_model(path, dtype)
    with casts_lifted(dtype):
        expected = theirs(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    batch = {"input_ids": ids, "labels": labels}
    assert relative(ours(batch).logits, expected) < tolerance
    nll = ours(batch, logits=False).nll_sum
    assert relative(nll, loss) < tolerance
    nll.backward()
    # Their gradients take the way of their weights: over a file, through the same rules.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    gradients = open_model(tmp_path / "gradients")
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, gradients[name]) < tolerance, name


@every_case
def test_a_conversion_is_certified_both_ways_and_bit_equal(case, saved, tmp_path):
    path = saved(case)
    certificate = import_from_hf(path, tmp_path / "ours", build_model=build_for_certificate)
    assert certificate.status == "certified"
    assert certificate.first_differing_layer is None
    certificate = export_to_hf(
        tmp_path / "ours", tmp_path / "back", build_model=build_for_certificate
    )
    assert certificate.status == "certified"
    record = json.loads((tmp_path / "back" / "conversion.json").read_text())
    assert record["family"] == CASES[case][0]
    first, second = (load_file(each / "model.safetensors") for each in (path, tmp_path / "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@every_case
def test_names_and_shapes_are_those_of_the_built_model(case, saved):
    opened = open_model(saved(case))
    config = {key: value for key, value in opened.config.items() if key != "format_version"}
    with torch.device("meta"):
        model = from_dict(config).build(KernelPolicy())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in opened.items()} == shapes


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "granitemoeshared", "deepseek_v3"])
def test_left_padded_prompts_agree(case, saved):
    path = saved(case)
    ours = our_model(open_model(path), torch.float64).eval()
    ids, valid = left_pad([[5, 6, 7, 8, 9], [3, 4], [10, 11, 12, 13, 14, 15, 16]])
    theirs = their_model(path, torch.float64)
    positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), casts_lifted(torch.float64):
        expected = theirs(
            input_ids=ids, attention_mask=valid.long(), position_ids=positions, use_cache=False
        ).logits[:, -1]
    got = next_logits(ours, {"input_ids": ids, "valid": valid}, ours.new_cache(3, 7))
    # Rounding in float64.
    assert relative(got, expected) < 1e-9

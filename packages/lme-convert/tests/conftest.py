"""Small random HuggingFace models on disk, and a reference model of ours in plain torch."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


def _inverse_frequencies(dim: int, theta: float, scaling: Mapping[str, Any] | None):
    inverse = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    if scaling is None:
        return inverse, 1.0
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return inverse / factor, 1.0
    original = scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = ((original * inverse / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return inverse * smooth + inverse / factor * (1 - smooth), 1.0

    def channel(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(channel(scaling.get("beta_fast", 32))), 0)
    last = min(math.ceil(channel(scaling.get("beta_slow", 1))), dim - 1)
    ramp = ((torch.arange(dim // 2) - first) / max(last - first, 0.001)).clamp(0, 1)
    magnitude = scaling.get("attention_factor") or 0.1 * math.log(factor) + 1
    return inverse * (1 - ramp) + inverse / factor * ramp, magnitude


class ReferenceModel:
    """A decoder written from the meaning of our config, for our names and layouts."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self.tensors = {name: tensors[name] for name in tensors}

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self._norm("final_norm", self.hidden_states(input_ids)[-1])
        head = "embedding" if self.config["tie_word_embeddings"] else "lm_head"
        return F.linear(x, self.tensors[f"{head}.weight"]) / (self.config.get("m_width") or 1.0)

    def hidden_states(self, input_ids: Tensor) -> list[Tensor]:
        config, scale = self.config, self.config.get("m_residual") or 1.0
        x = F.embedding(input_ids, self.tensors["embedding.weight"]) * (config.get("m_emb") or 1.0)
        states = [x]
        for layer in range(config["num_layers"]):
            mixer = config["sequence_mixer_blocks"]
            mixer = mixer[layer if len(mixer) > 1 else 0]
            mlp = config["mlp_blocks"][layer if len(config["mlp_blocks"]) > 1 else 0]
            at = f"blocks.{layer}"
            normed = self._norm(f"{at}.mixer_norm", x)
            x = x + scale * self._attention(f"{at}.sequence_mixer", mixer, normed)
            x = x + scale * self._mlp(f"{at}.mlp", mlp, self._norm(f"{at}.mlp_norm", x))
            states.append(x)
        return states

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        eps = self.config["layer_norm_epsilon"]
        return F.rms_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], eps)

    def _attention(self, name: str, mixer: Mapping[str, Any], x: Tensor) -> Tensor:
        B, S, _ = x.shape
        N, K, D = mixer["num_attention_heads"], mixer["num_key_value_heads"], mixer["head_dim"]
        grouped = self._linear(f"{name}.qkv", x).view(B, S, K, N // K + 2, D)
        query = grouped[:, :, :, :-2].reshape(B, S, N, D).transpose(1, 2)
        key, value = (grouped[:, :, :, place].transpose(1, 2) for place in (-2, -1))
        if mixer.get("qk_norm"):
            query, key = (
                self._norm(f"{name}.query_norm", query),
                self._norm(f"{name}.key_norm", key),
            )
        query, key = self._rotate(query), self._rotate(key)
        key, value = (each.repeat_interleave(N // K, dim=1) for each in (key, value))
        multiplier = mixer.get("attention_multiplier") or D**-0.5
        scores = query @ key.transpose(-1, -2) * multiplier
        distance = torch.arange(S)[:, None] - torch.arange(S)
        hidden = (distance < 0) | (distance >= (mixer.get("sliding_window") or S))
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return self._linear(
            f"{name}.output", (weights @ value).transpose(1, 2).reshape(B, S, N * D)
        )

    def _rotate(self, x: Tensor) -> Tensor:
        theta, scaling = self.config["rope_theta"], self.config["rope_scaling"]
        inverse, magnitude = _inverse_frequencies(x.shape[-1], theta, scaling)
        angles = torch.arange(x.shape[-2]).float()[:, None] * inverse
        angles = torch.cat((angles, angles), -1)
        left, right = x.chunk(2, dim=-1)
        rotated = torch.cat((-right, left), -1)
        return x * (angles.cos() * magnitude) + rotated * (angles.sin() * magnitude)

    def _mlp(self, name: str, mlp: Mapping[str, Any], x: Tensor) -> Tensor:
        both = self._linear(f"{name}.gate_up", x)
        gate, up = both[..., 0::2], both[..., 1::2]
        act = {
            "swiglu": F.silu,
            "geglu": F.gelu,
            "reglu": F.relu,
            "gelu_pytorch_tanh_glu": lambda gate: F.gelu(gate, approximate="tanh"),
        }[mlp["activation_function"]]
        return self._linear(f"{name}.down", act(gate) * up)


@pytest.fixture(scope="session")
def build_model():
    return ReferenceModel


BASE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session")
def save_hf():
    """Save a random model of a HuggingFace family; every tensor is random, norms and biases too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def save(path, model_type="llama", *, dtype=torch.float32, max_shard_size="1GB", **changes):
        config = AutoConfig.for_model(model_type, **(BASE | changes))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
        model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
        return path

    return save

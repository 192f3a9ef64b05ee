import pytest
import torch
from torch.nn import functional as F
from transformers import Mamba2Config as TheirConfig
from transformers import Mamba2ForCausalLM

from lme_core.config import from_dict
from lme_core.mixers.mamba2 import Mamba2Config
from lme_kernels.policy import KernelPolicy

FIELDS = {"state_size": 5, "intermediate_size": 16, "num_heads": 4, "num_groups": 2}
CASES = {
    "default": {},
    "one group": {"num_groups": 1, "conv_kernel_size": 2},
    "biases": {"add_bias": True, "use_conv_bias": False},
    "chunks": {"chunk_size": 3},
    "limits": {"time_step_limit": (0.3, 0.8)},
    "no norm": {"normalization_function": None, "activation_function": "tanh"},
    "layernorm": {"normalization_function": "layernorm"},
    "norms of groups": {"normalize_by_group": True},
    "width of the model": {"intermediate_size": None},
}


def loop(mixer, config):
    """The recurrence, a token and a head at a time."""
    n, N, G = config.state_size, config.num_heads, config.num_groups
    activation = {"silu": F.silu, "tanh": torch.tanh}[config.activation_function]

    def run(x):
        width = config.width(x.shape[1])
        P, K = width // N, config.conv_kernel_size
        gate, raw, dt = mixer.input(x).split([width, width + 2 * G * n, N], -1)
        rows, states = [], [x.new_zeros(P, n)] * N
        for t in range(len(x)):
            total = torch.zeros_like(raw[0])
            if mixer.convolution.bias is not None:
                total = total + mixer.convolution.bias
            for j in range(K):
                if t - K + 1 + j >= 0:
                    total = total + mixer.convolution.weight[:, 0, j] * raw[t - K + 1 + j]
            total = activation(total)
            inputs = total[:width].view(N, P)
            writer, reader = total[width:].view(2, G, n)
            outputs = []
            for head in range(N):
                step = F.softplus(dt[t, head] + mixer.decay_gate.dt_bias[head])
                step = step.clamp(*config.time_step_limit)
                decay = torch.exp(-torch.exp(mixer.decay_gate.A_log[head]) * step)
                group = head // (N // G)
                written = step * torch.outer(inputs[head], writer[group])
                states[head] = decay * states[head] + written
                outputs.append(states[head] @ reader[group] + mixer.D[head] * inputs[head])
            y = torch.cat(outputs) * F.silu(gate[t])
            match config.normalization_function:
                case "rmsnorm":
                    parts = y.view(G if config.normalize_by_group else 1, -1)
                    size = parts.square().mean(-1, keepdim=True).add(1e-5).sqrt()
                    y = (parts / size).flatten() * mixer.norm.weight
                case "layernorm":
                    y = F.layer_norm(y, (width,), mixer.norm.weight, mixer.norm.bias, 1e-5)
            rows.append(mixer.output(y))
        return torch.stack(rows)

    return run


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_the_recurrence(fields, build_mixer, assert_is_loop):
    config = Mamba2Config(**FIELDS | fields)
    mixer = build_mixer(config)
    assert_is_loop(mixer, loop(mixer, config))


def their_model(dtype, **fields):
    settings = {
        "vocab_size": 61,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "state_size": 6,
        "expand": 2,
        "num_heads": 6,
        "head_dim": 8,
        "n_groups": 3,
        "conv_kernel": 4,
        "chunk_size": 8,
        "layer_norm_epsilon": 1e-4,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = TheirConfig(**settings | fields)
    model = Mamba2ForCausalLM(config).to(dtype).train()
    with torch.no_grad():
        # Norms and biases start at one and zero, which would hide a mistake.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return config, model


def our_model(config, dtype):
    mixer = {
        "sequence_mixer_type": "mamba2",
        "state_size": config.state_size,
        "intermediate_size": config.expand * config.hidden_size,
        "num_heads": config.num_heads,
        "num_groups": config.n_groups,
        "conv_kernel_size": config.conv_kernel,
        "chunk_size": config.chunk_size,
        "time_step_limit": list(config.time_step_limit),
        "add_bias": config.use_bias,
        "use_conv_bias": config.use_conv_bias,
        "normalize_by_group": True,
    }
    settings = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "position_embedding_type": "nope",
        "sequence_mixer_blocks": [mixer],
        "mlp_blocks": [{"intermediate_size": 1}],
    }
    return from_dict(settings).build(KernelPolicy()).to(dtype)


def in_our_layout(theirs):
    names = {
        "norm.weight": "mixer_norm.weight",
        "mixer.in_proj": "sequence_mixer.input",
        "mixer.conv1d": "sequence_mixer.convolution",
        "mixer.dt_bias": "sequence_mixer.decay_gate.dt_bias",
        "mixer.A_log": "sequence_mixer.decay_gate.A_log",
        "mixer.D": "sequence_mixer.D",
        "mixer.norm": "sequence_mixer.norm",
        "mixer.out_proj": "sequence_mixer.output",
    }
    ours = {}
    for name, tensor in theirs.items():
        if not name.startswith("backbone.layers."):
            name = name.replace("backbone.embeddings", "embedding")
            ours[name.replace("backbone.norm_f", "final_norm")] = tensor
            continue
        _, _, layer, rest = name.split(".", 3)
        old = next(each for each in names if rest.startswith(each))
        ours[f"blocks.{layer}.{names[old]}{rest.removeprefix(old)}"] = tensor
    return ours


# float64 with the other side's casts lifted, relative to the largest value: rounding. float32 with
# transformers untouched: a few hundred roundings of 6e-8.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "fields", [{}, {"use_bias": True, "time_step_limit": (0.1, 0.9)}], ids=["plain", "biases"]
)
def test_logits_and_gradients_are_those_of_transformers(
    fields, dtype, tolerance, lift_casts, relative
):
    ids = torch.randint(0, 61, (2, 21), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    if dtype == torch.float64:
        lift_casts(dtype)
    config, theirs = their_model(dtype, **fields)
    expected = theirs(input_ids=ids).logits
    F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    ours = our_model(config, dtype)
    missing, unexpected = ours.load_state_dict(in_our_layout(theirs.state_dict()), strict=False)
    assert unexpected == []
    # Their layers have no MLP: ours must add nothing.
    assert all(".mlp" in name for name in missing)
    with torch.no_grad():
        for block in ours.blocks.values():
            block.mlp.down.weight.zero_()
    assert relative(ours({"input_ids": ids}).logits, expected) < tolerance
    ours({"input_ids": ids, "labels": labels}, logits=False).nll_sum.backward()
    gradients = in_our_layout({name: p.grad for name, p in theirs.named_parameters()})
    by_name = {name: p.grad for name, p in ours.named_parameters()}
    assert set(by_name) - set(gradients) == set(missing)
    for name, gradient in gradients.items():
        assert relative(by_name[name], gradient) < tolerance, name


def test_shapes_and_traits_are_those_of_the_seed_system(build_mixer):
    mixer = build_mixer(Mamba2Config(**FIELDS, add_bias=True))
    # gate 16, convolved 16 + 2 * 2 * 5, steps 4.
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "D": (4,),
        "input.weight": (56, 12),
        "input.bias": (56,),
        "convolution.weight": (36, 1, 4),
        "convolution.bias": (36,),
        "decay_gate.A_log": (4,),
        "decay_gate.dt_bias": (4,),
        "norm.weight": (16,),
        "output.weight": (12, 16),
        "output.bias": (12,),
    }
    specs = mixer.parameter_specs() | mixer.decay_gate.parameter_specs()
    assert {name: (spec.weight_decay, spec.mup) for name, spec in specs.items()} == {
        "D": (False, True),
        "A_log": (False, True),
        "dt_bias": (False, False),
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_groups": 3}, "multiple of `num_groups`, got 4 and 3"),
        ({"state_size": 0}, "`state_size` must be at least 1, got 0"),
        ({"conv_kernel_size": 1}, "`conv_kernel_size` must be at least 2, got 1"),
        ({"time_step_limit": (0.2, 0.1)}, "`time_step_limit` must be two numbers"),
        ({"activation_function": "swiglu"}, "no gate here, got `swiglu`: take `silu`"),
        ({"A_init_min": 20.0}, "below `A_init_max`, got 20.0 and 16.0"),
        ({"dt_init_min": 0.0}, "`dt_init_min` must be above 0"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Config(**FIELDS | fields)


def test_heads_that_do_not_divide_the_width_are_refused(build_mixer):
    with pytest.raises(ValueError, match=r"`num_heads` \(4\) must divide `intermediate_size` \(18"):
        build_mixer(Mamba2Config(**FIELDS | {"intermediate_size": 18}))

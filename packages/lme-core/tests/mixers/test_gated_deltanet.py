import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from lme_core.layers.context import SequenceContext
from lme_core.mixers.gated_deltanet import GatedDeltaNetConfig

K, V = 3, 4
FIELDS = {
    "k_head_dim": K,
    "v_head_dim": V,
    "num_k_heads": 2,
    "num_v_heads": 4,
    "use_gate": True,
    "allow_neg_eigval": False,
    "kernel_size": 3,
}
CASES = {
    "gate": {},
    "no gate": {"use_gate": False},
    "negative": {"allow_neg_eigval": True, "attention_multiplier": 0.3},
    "norm, then gate": {"norm_before_gate": True, "num_k_heads": 4},
}


def loop(mixer, config):
    """The rule, a token and a head at a time."""
    N, keys = config.num_v_heads, config.num_k_heads * K
    scale = config.attention_multiplier or K**-0.5

    def unit(x):
        return x / (x @ x + 1e-6).sqrt()

    def run(x):
        raw, gates = mixer.qkv(x), mixer.gates(x)
        taps, size = mixer.convolution.weight[:, 0], config.kernel_size
        states, rows = [x.new_zeros(V, K)] * N, []
        for t in range(len(x)):
            seen = range(max(t - size + 1, 0), t + 1)
            total = F.silu(sum(taps[:, size - 1 - t + i] * raw[i] for i in seen))
            query, key, value = total.split([keys, keys, N * V])
            outputs = []
            for n in range(N):
                group = n * config.num_k_heads // N
                q, k = (unit(each.view(-1, K)[group]) for each in (query, key))
                v = value.view(N, V)[n]
                step = F.softplus(gates[t, n] + mixer.decay_gate.dt_bias[n])
                decay = torch.exp(-torch.exp(mixer.decay_gate.A_log[n]) * step)
                beta = torch.sigmoid(gates[t, N + n]) * (2 if config.allow_neg_eigval else 1)
                erased = torch.eye(K, dtype=x.dtype) - beta * torch.outer(k, k)
                states[n] = decay * states[n] @ erased + beta * torch.outer(v, k)
                y = scale * states[n] @ q
                gate = 1.0
                if config.use_gate:
                    gate = F.silu(gates[t, 2 * N :].view(N, V)[n])
                if config.norm_before_gate:
                    outputs.append(F.rms_norm(y, (V,), mixer.norm.weight, 1e-5) * gate)
                else:
                    outputs.append(F.rms_norm(y * gate, (V,), mixer.norm.weight, 1e-5))
            rows.append(mixer.output(torch.cat(outputs)))
        return torch.stack(rows)

    return run


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_the_rule(fields, build_mixer, assert_is_loop):
    config = GatedDeltaNetConfig(**FIELDS | fields)
    mixer = build_mixer(config)
    assert_is_loop(mixer, loop(mixer, config))


# Wide enough that no query or key is so short that dividing by its length multiplies rounding.
WIDE = 8


def in_our_layout(theirs, N, G):
    """Ungroup the rows that transformers keeps by key head."""
    queries, keys, values, gates = (
        theirs["in_proj_qkvz.weight"]
        .unflatten(0, (G, -1))
        .split([WIDE, WIDE, N // G * V, N // G * V], dim=1)
    )
    strengths, steps = theirs["in_proj_ba.weight"].unflatten(0, (G, -1)).split(N // G, dim=1)
    ours = {
        "qkv.weight": torch.cat([each.flatten(0, 1) for each in (queries, keys, values)]),
        "gates.weight": torch.cat([each.flatten(0, 1) for each in (steps, strengths, gates)]),
    }
    names = {
        "conv1d.weight": "convolution.weight",
        "dt_bias": "decay_gate.dt_bias",
        "A_log": "decay_gate.A_log",
        "norm.weight": "norm.weight",
        "out_proj.weight": "output.weight",
    }
    return ours | {new: theirs[old] for old, new in names.items()}


# float64 with the other side's casts lifted: rounding. float32 with transformers untouched: a few
# hundred roundings of 6e-8.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_values_and_gradients_are_those_of_transformers(
    key_heads, dtype, tolerance, lift_casts, relative, build_mixer, random_input
):
    if dtype == torch.float64:
        lift_casts(dtype)
    config = Qwen3NextConfig(
        hidden_size=12,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=key_heads,
        linear_num_value_heads=4,
        linear_key_head_dim=WIDE,
        linear_value_head_dim=V,
        linear_conv_kernel_dim=3,
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    theirs = Qwen3NextGatedDeltaNet(config, 0).to(dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        theirs.A_log.sub_(2.0)
    fields = FIELDS | {"k_head_dim": WIDE, "num_k_heads": key_heads, "norm_before_gate": True}
    ours = build_mixer(GatedDeltaNetConfig(**fields), dtype=dtype)
    ours.load_state_dict(in_our_layout(theirs.state_dict(), 4, key_heads))
    x = random_input(2, 19, dtype=dtype)
    grad = random_input(2, 19, seed=2, dtype=dtype)
    expected, got = theirs(x), ours(x, SequenceContext(), None)
    assert relative(got, expected) < tolerance
    expected.backward(grad)
    got.backward(grad)
    gradients = in_our_layout({name: p.grad for name, p in theirs.named_parameters()}, 4, key_heads)
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, gradients[name]) < tolerance, name


def test_shapes_and_traits_are_those_of_the_seed_system(build_mixer):
    mixer = build_mixer(GatedDeltaNetConfig(**FIELDS))
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "qkv.weight": (28, 12),
        "gates.weight": (24, 12),
        "convolution.weight": (28, 1, 3),
        "decay_gate.A_log": (4,),
        "decay_gate.dt_bias": (4,),
        "norm.weight": (4,),
        "output.weight": (12, 16),
    }
    modules = (mixer.qkv, mixer.gates, mixer.convolution, mixer.decay_gate, mixer.output)
    specs = [spec for module in modules for spec in module.parameter_specs().values()]
    assert not any(spec.mup for spec in specs)
    # Matrices are decayed, the two vectors of the decay gate are not.
    assert [spec.weight_decay for spec in specs] == [True, True, True, False, False, True]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_v_heads": 3}, "`num_v_heads` must be a multiple of `num_k_heads`, got 3 and 2"),
        ({"k_head_dim": 0}, "`k_head_dim` must be at least 1"),
        ({"kernel_size": 1}, "`kernel_size` must be at least 2"),
        ({"dt_init_max": 1e-4}, "`dt_init_min` must be above 0 and at most `dt_init_max`"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        GatedDeltaNetConfig(**FIELDS | fields)

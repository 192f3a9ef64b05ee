import pytest
import torch
from torch.nn import functional as F

from lme_core.mixers.linear_attention import LinearAttentionConfig
from lme_core.mixers.m2rnn import M2RNNConfig

K, V = 3, 4
HEADS = {"num_q_heads": 1, "num_k_heads": 2, "num_v_heads": 4, "num_g_heads": 4}
CASES = {
    "linear attention": LinearAttentionConfig(
        k_head_dim=K, v_head_dim=V, num_q_heads=2, num_k_heads=2, num_v_heads=2, num_g_heads=2
    ),
    "linear attention, shared heads": LinearAttentionConfig(
        k_head_dim=K,
        v_head_dim=V,
        num_q_heads=4,
        num_k_heads=1,
        num_v_heads=2,
        num_g_heads=2,
        kernel_size=3,
        activation_function="silu",
        add_bias=True,
        normalization_function="rmsnorm",
        attention_multiplier=0.7,
    ),
    "m2rnn": M2RNNConfig(
        k_head_dim=K, v_head_dim=V, **HEADS, num_f_heads=4, num_weight_heads=4, use_residual=True
    ),
    # Fewer heads than the recurrence has, of each kind in turn, with the values added.
    "m2rnn, shared heads": M2RNNConfig(
        k_head_dim=K,
        v_head_dim=V,
        num_q_heads=4,
        num_k_heads=4,
        num_v_heads=2,
        num_f_heads=2,
        num_g_heads=1,
        num_weight_heads=2,
        use_residual=True,
        kernel_size=4,
        activation_function="silu",
        add_bias=True,
        normalization_function="rmsnorm",
    ),
    "m2rnn, function": M2RNNConfig(
        k_head_dim=K,
        v_head_dim=V,
        **HEADS,
        num_f_heads=1,
        num_weight_heads=1,
        use_residual=False,
        activation_function="tanh",
    ),
}
FUNCTIONS = {None: lambda x: x, "silu": F.silu, "tanh": torch.tanh}


def loop(mixer, config):
    """The recurrence, a token and a head at a time."""
    is_m2rnn = isinstance(config, M2RNNConfig)
    heads = [config.num_q_heads, config.num_k_heads, config.num_v_heads]
    N = max(*heads, config.num_g_heads)
    sizes = [heads[0] * K, heads[1] * K, heads[2] * V]
    scale = 1.0 if is_m2rnn else config.attention_multiplier or K**-0.5

    def head(x, n, width):
        """Head n of N, of the fewer that `x` holds."""
        parts = x.view(-1, width)
        return parts[n * len(parts) // N]

    def run(x):
        forget_width = config.num_f_heads if is_m2rnn else 0
        widths = [sum(sizes), forget_width, config.num_g_heads * V]
        raw, forget, gate = mixer.input(x).split(widths, -1)
        states, rows = [x.new_zeros(K, V)] * N, []
        for t in range(len(x)):
            total = raw[t]
            if config.kernel_size is not None:
                taps, size = mixer.convolution.weight[:, 0], config.kernel_size
                seen = range(max(t - size + 1, 0), t + 1)
                total = sum(taps[:, size - 1 - t + i] * raw[i] for i in seen)
                total = total + mixer.convolution.bias
            total = FUNCTIONS[config.activation_function](total)
            query, key, value = total.split(sizes)
            outputs, gates = [], []
            for n in range(N):
                q, k, v = head(query, n, K), head(key, n, K), head(value, n, V)
                written = torch.outer(k, v)
                if is_m2rnn:
                    step = F.softplus(head(forget[t], n, 1) + mixer.decay_gate.dt_bias[n])
                    kept = torch.exp(-torch.exp(mixer.decay_gate.A_log[n]) * step)
                    W = mixer.state_weight[n * len(mixer.state_weight) // N]
                    new = torch.tanh(states[n] @ W + written)
                    states[n] = kept * states[n] + (1 - kept) * new
                else:
                    states[n] = states[n] + written
                y = scale * (q @ states[n])
                outputs.append(y + mixer.D[n] * v if is_m2rnn and config.use_residual else y)
                gates.append(F.silu(head(gate[t], n, V)))
            y = torch.cat(outputs) * torch.cat(gates)
            if config.normalization_function == "rmsnorm":
                y = F.rms_norm(y, (N * V,), mixer.norm.weight, 1e-5)
            rows.append(mixer.output(y))
        return torch.stack(rows)

    return run


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_the_recurrence(config, build_mixer, assert_is_loop):
    mixer = build_mixer(config)
    assert_is_loop(mixer, loop(mixer, config))


def test_shapes_and_traits_are_those_of_the_seed_system(build_mixer):
    mixer = build_mixer(CASES["m2rnn"])
    # q 3, k 6, v 16, f 4, gate 16.
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "state_weight": (4, 4, 4),
        "D": (4, 4),
        "input.weight": (45, 12),
        "decay_gate.A_log": (4,),
        "decay_gate.dt_bias": (4,),
        "output.weight": (12, 16),
    }
    specs = mixer.parameter_specs()
    assert not any(spec.weight_decay for spec in specs.values())
    assert specs["state_weight"].mup
    mixer = build_mixer(CASES["linear attention, shared heads"])
    # q 12, k 3, v 8, gate 8.
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "input.weight": (31, 12),
        "input.bias": (31,),
        "convolution.weight": (23, 1, 3),
        "convolution.bias": (23,),
        "norm.weight": (16,),
        "output.weight": (12, 16),
    }


def test_matrices_start_as_identities_in_any_cut(build_mixer):
    initial = build_mixer(CASES["m2rnn"]).parameter_specs()["state_weight"].initial
    whole = initial(5, (3, 4, 4))
    assert torch.equal(whole, torch.eye(4).expand(3, 4, 4))
    region = (slice(1, 3), slice(2, 4), slice(1, 4))
    assert torch.equal(initial(5, (3, 4, 4), region), whole[region])


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (LinearAttentionConfig, {"num_g_heads": 3}, "`num_g_heads` must divide"),
        (LinearAttentionConfig, {"k_head_dim": 0}, "`k_head_dim` must be at least 1"),
        (
            LinearAttentionConfig,
            {"activation_function": "silu"},
            "`activation_function` must be null without `kernel_size`, got `silu`",
        ),
        (M2RNNConfig, {"num_weight_heads": 3}, "`num_weight_heads` must divide"),
        (M2RNNConfig, {"gradient_clipping": -1.0}, "`gradient_clipping` must be above 0"),
        (M2RNNConfig, {"dt_init_floor": 0.0}, "`dt_init_floor` must be above 0"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name(kind, fields, message):
    sizes = {"k_head_dim": K, "v_head_dim": V, **HEADS}
    if kind is M2RNNConfig:
        sizes |= {"num_f_heads": 4, "num_weight_heads": 4, "use_residual": False}
    with pytest.raises(ValueError, match=message):
        kind(**sizes | fields)


def test_settings_of_a_decay_that_is_not_there_are_named(caplog):
    sizes = {"k_head_dim": K, "v_head_dim": V, **HEADS}
    LinearAttentionConfig(**sizes, A_init_max=16.0)
    assert "A_init_max=16" in caplog.text

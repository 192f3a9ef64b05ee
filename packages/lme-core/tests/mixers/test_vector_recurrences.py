import pytest
import torch
from torch.nn import functional as F

from lme_core.layers.context import SequenceContext
from lme_core.mixers.gru import GRUConfig
from lme_core.mixers.lstm import LSTMConfig
from lme_core.mixers.rnn import RNNConfig

D = 3
CASES = {
    "rnn": RNNConfig(state_head_dim=D, num_input_heads=4, num_weight_heads=4),
    "rnn, shared inputs": RNNConfig(
        state_head_dim=D,
        num_input_heads=2,
        num_weight_heads=4,
        add_bias=True,
        normalization_function="rmsnorm",
        kernel_size=3,
        activation_function="silu",
    ),
    # A convolution without a function, and fewer matrices than heads.
    "rnn, shared matrices": RNNConfig(
        state_head_dim=D, num_input_heads=4, num_weight_heads=2, kernel_size=4
    ),
    # A function without a convolution.
    "rnn, function": RNNConfig(
        state_head_dim=D,
        num_input_heads=1,
        num_weight_heads=1,
        activation_function="gelu",
        normalization_function="p_norm",
    ),
    "gru": GRUConfig(
        state_head_dim=D,
        num_input_heads=4,
        num_forget_input_heads=4,
        num_reset_input_heads=4,
        num_weight_heads=4,
        num_forget_weight_heads=4,
        num_reset_weight_heads=4,
    ),
    "gru, shared": GRUConfig(
        state_head_dim=D,
        num_input_heads=2,
        num_forget_input_heads=4,
        num_reset_input_heads=1,
        num_weight_heads=1,
        num_forget_weight_heads=2,
        num_reset_weight_heads=4,
        add_bias=True,
        normalization_function="layernorm",
        kernel_size=2,
        activation_function="tanh",
    ),
    "lstm": LSTMConfig(state_head_dim=D, num_input_heads=2, num_weight_heads=4),
    "lstm, convolved": LSTMConfig(
        state_head_dim=D,
        num_input_heads=4,
        num_weight_heads=2,
        add_bias=True,
        normalization_function="rmsnorm",
        kernel_size=3,
        activation_function="silu",
    ),
}
FUNCTIONS = {None: lambda x: x, "silu": F.silu, "tanh": torch.tanh, "gelu": F.gelu}


def step(config, state, inputs, weights):
    """One token of one head: the new (h, c), c of an lstm only."""
    h, c = state
    match config.sequence_mixer_type:
        case "rnn":
            return torch.tanh(h @ weights[0] + inputs[0]), c
        case "gru":
            forget = torch.sigmoid(h @ weights[1] + inputs[1])
            reset = torch.sigmoid(h @ weights[2] + inputs[2])
            candidate = torch.tanh((reset * h) @ weights[0] + inputs[0])
            return forget * h + (1 - forget) * candidate, c
        case "lstm":
            gates = [torch.sigmoid(h @ weights[i] + inputs[i]) for i in (1, 2, 3)]
            c = gates[0] * c + gates[1] * torch.tanh(h @ weights[0] + inputs[0])
            return gates[2] * torch.tanh(c), c


def head_counts(config):
    """Heads of each input and of each matrix."""
    if config.sequence_mixer_type == "gru":
        inputs = [config.num_input_heads, config.num_forget_input_heads]
        weights = [config.num_weight_heads, config.num_forget_weight_heads]
        return [*inputs, config.num_reset_input_heads], [*weights, config.num_reset_weight_heads]
    copies = 1 if config.sequence_mixer_type == "rnn" else 4
    return [config.num_input_heads] * copies, [config.num_weight_heads] * copies


def loop(mixer, config):
    """The recurrence, a token and a head at a time."""
    inputs_heads, weight_heads = head_counts(config)
    N = max(*inputs_heads, *weight_heads)

    def run(x):
        rows = mixer.input(x).split([*(D * n for n in inputs_heads), N * D], -1)
        raw, gate = rows[0], rows[-1]
        candidates = []
        for t in range(len(x)):
            total = raw[t]
            if config.kernel_size is not None:
                taps, K = mixer.convolution.weight[:, 0], config.kernel_size
                seen = range(max(t - K + 1, 0), t + 1)
                total = sum(taps[:, K - 1 - t + i] * raw[i] for i in seen)
                if mixer.convolution.bias is not None:
                    total = total + mixer.convolution.bias
            candidates.append(FUNCTIONS[config.activation_function](total))
        inputs = [torch.stack(candidates), *rows[1:-1]]
        weights, first = [], 0
        for heads in weight_heads:
            weights.append(mixer.state_weight[first : first + heads])
            first += heads
        states = [(x.new_zeros(D), x.new_zeros(D))] * N
        outputs = []
        for t in range(len(x)):
            for n in range(N):
                its = [
                    each[t].view(heads, D)[n * heads // N]
                    for each, heads in zip(inputs, inputs_heads, strict=True)
                ]
                matrices = [each[n * len(each) // N] for each in weights]
                states[n] = step(config, states[n], its, matrices)
            y = torch.cat([h for h, _ in states]) * F.silu(gate[t])
            match config.normalization_function:
                case "rmsnorm":
                    y = F.rms_norm(y, (N * D,), mixer.norm.weight, 1e-5)
                case "layernorm":
                    y = F.layer_norm(y, (N * D,), mixer.norm.weight, mixer.norm.bias, 1e-5)
                case "p_norm":
                    y = mixer.norm.weight * y / y.norm()
            outputs.append(mixer.output(y))
        return torch.stack(outputs)

    return run


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_the_recurrence(config, build_mixer, assert_is_loop):
    mixer = build_mixer(config)
    assert_is_loop(mixer, loop(mixer, config))


def test_the_gradient_of_each_state_is_bounded(build_mixer, random_input):
    config = RNNConfig(
        state_head_dim=D, num_input_heads=1, num_weight_heads=1, gradient_clipping=1e-3
    )
    mixer = build_mixer(config)
    x = random_input(1, 6)
    got = torch.autograd.grad(mixer(x, SequenceContext(), None).sum(), mixer.input.weight)[0]
    # Backward in time by hand: what reaches a state is cut before it goes on.
    raw, gate = mixer.input(x[0]).split(D, -1)
    W, states = mixer.state_weight[0], [torch.zeros(D, dtype=x.dtype)]
    for t in range(6):
        states.append(torch.tanh(states[-1] @ W + raw[t]))
    d_y = mixer.output.weight.sum(0)
    d_raw, d_gate, carried = [None] * 6, [None] * 6, torch.zeros(D, dtype=x.dtype)
    for t in reversed(range(6)):
        sigmoid = torch.sigmoid(gate[t])
        d_gate[t] = d_y * states[t + 1] * sigmoid * (1 + gate[t] * (1 - sigmoid))
        reached = (d_y * F.silu(gate[t]) + carried).clamp(-1e-3, 1e-3)
        d_raw[t] = reached * (1 - states[t + 1] ** 2)
        carried = d_raw[t] @ W.T
    expected = torch.cat((torch.stack(d_raw).T @ x[0], torch.stack(d_gate).T @ x[0]))
    # Rounding in float64.
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_shapes_are_those_of_the_seed_system(build_mixer):
    def shapes(config):
        return {name: tuple(p.shape) for name, p in build_mixer(config).named_parameters()}

    # Inputs of 2 heads and a gate of 4; the convolution has the channels that it sees.
    assert shapes(CASES["rnn, shared inputs"]) == {
        "state_weight": (4, 3, 3),
        "input.weight": (18, 12),
        "input.bias": (18,),
        "convolution.weight": (6, 1, 3),
        "convolution.bias": (6,),
        "norm.weight": (12,),
        "output.weight": (12, 12),
    }
    # Fewer matrices are fewer parameters.
    assert shapes(CASES["rnn, shared matrices"])["state_weight"] == (2, 3, 3)
    assert shapes(CASES["gru"])["input.weight"] == (48, 12)
    assert shapes(CASES["gru, shared"])["state_weight"] == (7, 3, 3)


@pytest.mark.parametrize(
    "config",
    [CASES[name] for name in ("rnn", "gru", "lstm")],
    ids=lambda config: config.sequence_mixer_type,
)
def test_matrices_of_states_follow_the_width_and_do_not_decay(config, build_mixer):
    spec = build_mixer(config).parameter_specs()
    assert spec.keys() == {"state_weight"}
    assert spec["state_weight"].mup
    assert not spec["state_weight"].weight_decay


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_weight_heads": 3},
            r"`num_weight_heads` must divide .*`num_input_heads` \(4\), got 3",
        ),
        ({"num_input_heads": 0}, "`num_input_heads` must be at least 1, got 0"),
        ({"state_head_dim": 0}, "`state_head_dim` must be at least 1"),
        ({"gradient_clipping": 0.0}, "`gradient_clipping` must be above 0"),
        ({"kernel_size": 1}, "`kernel_size` must be at least 2, or null for none, got 1"),
        ({"activation_function": "swiglu"}, "no gate here, got `swiglu`"),
        ({"activation_function": "sillu"}, "did you mean `silu`"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name(fields, message):
    sizes = {"state_head_dim": D, "num_input_heads": 4, "num_weight_heads": 4}
    for kind in (RNNConfig, LSTMConfig):
        with pytest.raises(ValueError, match=message):
            kind(**sizes | fields)
    gates = {
        "num_forget_input_heads": 1,
        "num_reset_input_heads": 1,
        "num_forget_weight_heads": 1,
        "num_reset_weight_heads": 1,
    }
    with pytest.raises(ValueError, match=message):
        GRUConfig(**sizes | gates | fields)

import pytest
import torch
from torch.nn import functional as F

from lme_core.mixers.causal_convolution import CausalConvolutionConfig

SIZES = {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "num_groups": 2}
CASES = {
    "groups": {},
    "one group, biases": {"num_groups": 1, "add_bias": True, "activation_function": "tanh"},
    "gated": {"activation_function": "swiglu", "kernel_size": 2},
}


def loop(mixer, config):
    """The convolution, a token, an output channel and a tap at a time."""
    K, G = config.kernel_size, config.num_groups
    taps, bias = mixer.convolution.weight, mixer.convolution.bias

    def run(x):
        raw, rows = mixer.input(x), []
        for t in range(len(x)):
            channels = []
            for c in range(config.out_channels):
                group = c // (config.out_channels // G)
                total = x.new_zeros(()) if bias is None else bias[c]
                for i in range(max(t - K + 1, 0), t + 1):
                    total = total + taps[c, :, K - 1 - t + i] @ raw[i].view(G, -1)[group]
                channels.append(total)
            y = torch.stack(channels)
            match config.activation_function:
                case "silu":
                    y = F.silu(y)
                case "tanh":
                    y = torch.tanh(y)
                case "swiglu":
                    y = F.silu(y[0::2]) * y[1::2]
            rows.append(mixer.output(y))
        return torch.stack(rows)

    return run


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_the_formula(fields, build_mixer, assert_is_loop):
    config = CausalConvolutionConfig(**SIZES | fields)
    mixer = build_mixer(config)
    assert_is_loop(mixer, loop(mixer, config))


def test_shapes_are_those_of_the_seed_system(build_mixer):
    mixer = build_mixer(
        CausalConvolutionConfig(**SIZES, add_bias=True, activation_function="swiglu")
    )
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "input.weight": (6, 12),
        "input.bias": (6,),
        "convolution.weight": (8, 3, 3),
        "convolution.bias": (8,),
        "output.weight": (12, 4),
        "output.bias": (12,),
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_groups": 4}, "`in_channels` must be a multiple of `num_groups`, got 6 and 4"),
        ({"kernel_size": 1}, "`kernel_size` must be at least 2, got 1"),
        (
            {"activation_function": "swiglu", "out_channels": 5, "num_groups": 1},
            "`out_channels` must be even",
        ),
        ({"activation_function": "sillu"}, "did you mean `silu`"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        CausalConvolutionConfig(**SIZES | fields)

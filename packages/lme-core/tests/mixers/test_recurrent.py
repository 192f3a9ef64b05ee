"""What all mixers with a state have in common, whatever they compute."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.generation import generate, left_pad, next_logits
from lme_core.layers.context import SequenceContext
from lme_core.mixers.causal_convolution import CausalConvolutionConfig
from lme_core.mixers.gated_deltanet import GatedDeltaNetConfig
from lme_core.mixers.gru import GRUConfig
from lme_core.mixers.linear_attention import LinearAttentionConfig
from lme_core.mixers.lstm import LSTMConfig
from lme_core.mixers.m2rnn import M2RNNConfig
from lme_core.mixers.mamba2 import Mamba2Config
from lme_core.mixers.rnn import RNNConfig
from lme_core.mixers.softmax_attention import SoftmaxAttentionConfig
from lme_core.mlps.dense import DenseMLPConfig
from lme_kernels.policy import KernelPolicy

CONFIGS = {
    "mamba2": Mamba2Config(
        state_size=3, intermediate_size=8, num_heads=2, num_groups=1, add_bias=True, chunk_size=4
    ),
    "gated_deltanet": GatedDeltaNetConfig(
        k_head_dim=3,
        v_head_dim=2,
        num_k_heads=1,
        num_v_heads=2,
        use_gate=True,
        allow_neg_eigval=True,
        kernel_size=3,
    ),
    "rnn": RNNConfig(
        state_head_dim=3,
        num_input_heads=1,
        num_weight_heads=2,
        add_bias=True,
        kernel_size=3,
        activation_function="silu",
        normalization_function="rmsnorm",
    ),
    "gru": GRUConfig(
        state_head_dim=3,
        num_input_heads=2,
        num_forget_input_heads=2,
        num_reset_input_heads=1,
        num_weight_heads=1,
        num_forget_weight_heads=2,
        num_reset_weight_heads=2,
        add_bias=True,
        kernel_size=2,
    ),
    "lstm": LSTMConfig(state_head_dim=3, num_input_heads=2, num_weight_heads=2, add_bias=True),
    "linear_attention": LinearAttentionConfig(
        k_head_dim=3,
        v_head_dim=2,
        num_q_heads=1,
        num_k_heads=1,
        num_v_heads=2,
        num_g_heads=1,
        kernel_size=4,
        activation_function="silu",
        add_bias=True,
        normalization_function="rmsnorm",
    ),
    "m2rnn": M2RNNConfig(
        k_head_dim=3,
        v_head_dim=2,
        num_q_heads=1,
        num_k_heads=1,
        num_v_heads=2,
        num_f_heads=1,
        num_g_heads=2,
        num_weight_heads=2,
        use_residual=True,
        kernel_size=3,
        activation_function="silu",
        add_bias=True,
    ),
    "causal_convolution": CausalConvolutionConfig(
        in_channels=4,
        out_channels=8,
        kernel_size=4,
        num_groups=2,
        activation_function="swiglu",
        add_bias=True,
    ),
}
every_mixer = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
NONE = SequenceContext()


def new_cache(mixer, rows, dtype=torch.float64):
    return mixer.new_cache(rows, 100, device=torch.device("cpu"), dtype=dtype)


@every_mixer
def test_a_document_does_not_feel_another(config, build_mixer, random_input, cu_seqlens):
    mixer = build_mixer(config)
    context = SequenceContext(cu_seqlens=cu_seqlens)
    x, other = random_input(), random_input(seed=7)
    tokens = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2])
    grad = random_input(seed=3)
    results = []
    for first in (x, torch.where((tokens < 11)[..., None], other * 1e3, x)):
        inputs = first.clone().requires_grad_()
        y = mixer(inputs, context, None)
        # The loss is of the later documents only.
        y.backward(torch.where((tokens >= 11)[..., None], grad, 0.0))
        results.append((y.detach(), inputs.grad))
    (y, of_x), (y_2, of_x_2) = results
    # Bit for bit, forward and backward; the change itself is seen.
    assert torch.equal(y[1], y_2[1])
    assert torch.equal(of_x[1], of_x_2[1])
    assert not of_x[0].any()
    assert not torch.equal(y[0], y_2[0])


@every_mixer
def test_padding_on_the_right_changes_nothing_before_it(config, build_mixer, random_input):
    mixer = build_mixer(config)
    x = random_input()
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    valid[1, 6:] = False
    padded = torch.where(valid[..., None], x, 1e3)
    y = mixer(padded, SequenceContext(valid=valid), None)
    alone = mixer(x[1:, :6], NONE, None)
    # Rounding of products of other shapes.
    torch.testing.assert_close(y[1:, :6], alone, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(y[0], mixer(x, NONE, None)[0], rtol=1e-9, atol=1e-11)


@every_mixer
# Token by token; in pieces shorter and longer than the convolution; all at once.
@pytest.mark.parametrize("pieces", [[1] * 11, [2, 1, 5, 3], [11]], ids=str)
def test_cached_is_uncached(config, pieces, build_mixer, random_input):
    mixer = build_mixer(config)
    x = random_input()
    cache = new_cache(mixer, 2)
    with torch.no_grad():
        got = torch.cat([mixer(piece, NONE, cache) for piece in x.split(pieces, 1)], 1)
    # Rounding of other chunks in float64.
    torch.testing.assert_close(got, mixer(x, NONE, None), rtol=1e-9, atol=1e-11)


@every_mixer
def test_padding_on_the_left_leaves_the_state_untouched(config, build_mixer, random_input):
    mixer = build_mixer(config)
    x = random_input(3, 9)
    cache = new_cache(mixer, 3)
    alone = [new_cache(mixer, 1) for _ in range(3)]
    # A whole row of padding; then padding after tokens, as in a conversation.
    for length, lengths in ((4, [4, 0, 2]), (4, [1, 4, 3]), (1, [1, 1, 1])):
        piece, x = x[:, :length], x[:, length:]
        counts = torch.tensor(lengths)[:, None]
        valid = torch.arange(length) >= length - counts
        piece = torch.where(valid[..., None], piece, 1e3)
        with torch.no_grad():
            got = mixer(piece, SequenceContext(valid=valid), cache)
            for row, count in enumerate(lengths):
                if count == 0:
                    continue
                its = piece[row : row + 1, length - count :]
                expected = mixer(its, NONE, alone[row])
                torch.testing.assert_close(
                    got[row : row + 1, length - count :], expected, rtol=1e-9, atol=1e-11
                )
                for name in ("state", "convolution"):
                    state, its = getattr(cache, name), getattr(alone[row], name)
                    if state is not None:
                        torch.testing.assert_close(state[row], its[0], rtol=1e-9, atol=1e-11)


@every_mixer
def test_a_row_of_padding_keeps_its_state_bit_for_bit(config, build_mixer, random_input):
    mixer = build_mixer(config)
    cache = new_cache(mixer, 2)
    valid = torch.tensor([[True] * 3, [False] * 3])
    with torch.no_grad():
        mixer(random_input(2, 5), NONE, cache)
        before = [cache.state, cache.convolution]
        mixer(random_input(2, 3, seed=4), SequenceContext(valid=valid), cache)
    for old, new in zip(before, [cache.state, cache.convolution], strict=True):
        if old is not None:
            assert torch.equal(old[1], new[1])
            assert not torch.equal(old[0], new[0])


@every_mixer
def test_a_cache_has_one_size_and_can_be_reordered(config, build_mixer, random_input):
    mixer = build_mixer(config)
    x = random_input(3, 12)
    cache = new_cache(mixer, 3)
    shapes = [getattr(cache.state, "shape", None), getattr(cache.convolution, "shape", None)]
    rows = torch.tensor([2, 0, 2])
    with torch.no_grad():
        mixer(x[:, :11], NONE, cache)
        cache.reorder(rows)
        got = mixer(x[rows, 11:], NONE, cache)
    torch.testing.assert_close(got, mixer(x, NONE, None)[rows, 11:], rtol=1e-9, atol=1e-11)
    assert shapes == [
        getattr(cache.state, "shape", None),
        getattr(cache.convolution, "shape", None),
    ]


def test_a_state_is_kept_in_float32_under_bfloat16(build_mixer, random_input):
    mixer = build_mixer(CONFIGS["mamba2"], dtype=torch.bfloat16)
    cache = new_cache(mixer, 2, torch.bfloat16)
    with torch.no_grad():
        mixer(random_input(dtype=torch.bfloat16), NONE, cache)
    assert cache.state.dtype == torch.float32
    assert cache.convolution.dtype == torch.bfloat16


def test_packed_documents_and_a_cache_exclude_each_other(build_mixer, random_input, cu_seqlens):
    mixer = build_mixer(CONFIGS["gru"])
    with pytest.raises(ValueError, match=r"`cu_seqlens` .* cannot be continued from a cache"):
        mixer(random_input(), SequenceContext(cu_seqlens=cu_seqlens), new_cache(mixer, 2))


@every_mixer
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_finite_differences(config, packed, build_mixer, random_input):
    mixer = build_mixer(config, hidden_size=2)
    names = [name for name, _ in mixer.named_parameters()]
    bounds = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    context = SequenceContext(cu_seqlens=bounds) if packed else NONE

    def run(x, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(mixer, parameters, (x, context, None))

    x = random_input(2, 3, hidden_size=2).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *mixer.parameters()), fast_mode=True)


# Packed rows take the longer way; one of each kind of loop takes the other too.
@pytest.mark.parametrize(
    ("name", "packed"), [*((name, True) for name in CONFIGS), ("mamba2", False), ("gru", False)]
)
def test_alike_layers_compile_whole_and_once(name, packed, build_mixer, random_input):
    torch.compiler.reset()
    layers = [build_mixer(CONFIGS[name]) for _ in range(2)]
    with torch.no_grad():
        for parameter in layers[1].parameters():
            parameter.mul_(0.7)
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    bounds = torch.tensor([0, 2, 3], dtype=torch.int32)
    context = SequenceContext(cu_seqlens=bounds) if packed else NONE
    x = random_input(1, 3).requires_grad_()

    def run():
        y = layers[1](layers[0](x, context, None), context, None)
        return y, torch.autograd.grad(y.square().sum(), parameters)

    expected, gradients = run()
    for layer in layers:
        layer.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got, of_got = run()
    # The compiler may split an operation into others: rounding in float64.
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    for ours, its in zip(of_got, gradients, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-9, atol=1e-11)


@every_mixer
@pytest.mark.parametrize("packed", [False, True])
def test_a_sequence_cut_in_two_is_whole_through_the_exchange(
    config, packed, build_mixer, random_input
):
    """Both halves as two devices hold them, each given what the other has."""
    mixer = build_mixer(config)
    x = random_input(1, 10)
    # Documents before, across and after the cut.
    whole = torch.tensor([0, 2, 7, 10], dtype=torch.int32) if packed else None
    halves = [torch.tensor(each, dtype=torch.int32) for each in ([0, 2, 5], [0, 2, 5])]
    expected = mixer(x, SequenceContext(cu_seqlens=whole), None)
    kept = {}

    def first_state(run, initial, *, cu_seqlens, log_decay):
        y, state = run(initial)
        kept["state"] = state[-1:]
        return y, state

    def first_halo(inputs, initial, *, width, cu_seqlens):
        kept["halo"] = (inputs if packed else inputs[0])[-width:].T[None]
        return initial

    def second_state(run, initial, *, cu_seqlens, log_decay):
        sequences = 1 if cu_seqlens is None else len(cu_seqlens) - 1
        state = kept["state"]
        zeros = state.new_zeros((sequences - 1, *state.shape[1:]))
        y, last = run(torch.cat((state, zeros)))
        if log_decay is not None and cu_seqlens is None:
            # What a device may use to run first and hear of the state later.
            factor = log_decay.sum(1).exp().view(1, -1, 1, 1)
            torch.testing.assert_close(last, run(None)[1] + factor * state, rtol=1e-9, atol=1e-11)
        return y, last

    def second_halo(inputs, initial, *, width, cu_seqlens):
        sequences = 1 if cu_seqlens is None else len(cu_seqlens) - 1
        halo = kept["halo"]
        return torch.cat((halo, halo.new_zeros((sequences - 1, *halo.shape[1:]))))

    outputs = []
    exchanges = [(first_state, first_halo), (second_state, second_halo)]
    for half, bounds, exchange in zip(x.split(5, 1), halves, exchanges, strict=True):
        mixer.exchange_state, mixer.exchange_halo = exchange
        outputs.append(mixer(half, SequenceContext(cu_seqlens=bounds if packed else None), None))
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-9, atol=1e-11)


def decoder(*configs, **fields):
    settings = {"position_embedding_type": "nope", "initializer_range": 0.3} | fields
    return GPTBaseConfig(
        vocab_size=41,
        hidden_size=12,
        num_layers=len(configs),
        sequence_mixer_blocks=configs,
        mlp_blocks=(DenseMLPConfig(intermediate_size=8),),
        **settings,
    ).build(KernelPolicy())


PROMPTS = [[5, 6, 7, 8, 9], [3, 4], [10, 11, 12, 13, 14, 15, 16], [1]]


@every_mixer
def test_padded_prompts_continue_as_each_alone(config):
    model = decoder(config, config).double()
    ids, valid = left_pad(PROMPTS)
    cache = model.new_cache(4, 12)
    batch = {"input_ids": ids, "valid": valid}
    tokens = [list(prompt) for prompt in PROMPTS]
    for step in range(4):
        together = next_logits(model, batch, cache)
        with torch.no_grad():
            apart = [model({"input_ids": torch.tensor([row])}).logits[0, -1] for row in tokens]
        # Rounding in float64.
        torch.testing.assert_close(together, torch.stack(apart), rtol=1e-9, atol=1e-10)
        new = (torch.arange(4) * 7 + step) % 41
        batch = {"input_ids": new[:, None]}
        for row, token in zip(tokens, new.tolist(), strict=True):
            row.append(token)


def test_a_hybrid_of_all_generates_what_it_computes():
    attention = SoftmaxAttentionConfig(num_attention_heads=2, num_key_value_heads=1)
    fields = {"position_embedding_type": "rope", "rope_dim": 6}
    model = decoder(*CONFIGS.values(), attention, **fields).double()
    ids, valid = left_pad(PROMPTS)
    got = generate(model, ids, valid=valid, max_new_tokens=5, temperature=0)
    for row, prompt in zip(got.tolist(), PROMPTS, strict=True):
        tokens = list(prompt)
        for _ in range(5):
            logits = model({"input_ids": torch.tensor([tokens])}).logits
            tokens.append(int(logits[0, -1].argmax()))
        assert row == tokens[len(prompt) :]


@every_mixer
def test_initial_values_are_of_the_name_and_no_generator_is_used(config):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model, again = decoder(config, config), decoder(config, config)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):
        empty = decoder(config, config)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert torch.equal(empty.initial_value(name), parameter), name
        assert parameter.isfinite().all(), name
        cut = tuple(slice(size // 3, size) for size in parameter.shape)
        assert torch.equal(model.initial_value(name, cut), parameter[cut]), name


def test_decay_gates_start_where_their_settings_say():
    config = Mamba2Config(
        state_size=1,
        intermediate_size=4096,
        num_heads=4096,
        num_groups=1,
        A_init_min=1.0,
        A_init_max=4.0,
        dt_init_min=1e-4,
        dt_init_max=0.1,
        dt_init_floor=1e-3,
    )
    with torch.device("meta"):
        model = decoder(config)
    gate = "blocks.0.sequence_mixer.decay_gate"
    rate = model.initial_value(f"{gate}.A_log").double().exp()
    assert rate.min() > 1.0 - 1e-6
    assert rate.max() < 4.0 + 1e-6
    # Uniform: mean 2.5, standard deviation 3 / sqrt(12), each within 4 standard errors.
    assert abs(rate.mean() - 2.5) < 4 * 0.87 / 64
    assert abs(rate.std() - 0.866) < 0.03
    step = torch.nn.functional.softplus(model.initial_value(f"{gate}.dt_bias").double())
    # A third of the logarithms is below the floor and raised to it.
    assert step.min() == pytest.approx(1e-3, rel=1e-5)
    assert step.max() < 0.1 + 1e-6
    assert (step < 1.0001e-3).double().mean() == pytest.approx(1 / 3, abs=0.03)
    above = step[step > 1.0001e-3].log()
    assert above.mean() == pytest.approx(torch.tensor([1e-3, 0.1]).log().mean().item(), abs=0.08)


@pytest.mark.gpu
@every_mixer
@pytest.mark.parametrize("packed", [False, True])
def test_a_gpu_computes_what_a_cpu_does(
    config, packed, build_mixer, random_input, cu_seqlens, monkeypatch
):
    # As in training, where `set_tf32` sees to it.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        mixer = build_mixer(config).to(device, dtype)
        x = random_input().to(device, dtype).requires_grad_()
        context = SequenceContext(cu_seqlens=cu_seqlens.to(device)) if packed else NONE
        y = mixer(x, context, None)
        y.backward(random_input(seed=2).to(device, dtype))
        grads = [x.grad, *(parameter.grad for parameter in mixer.parameters())]
        results.append([each.detach().double().cpu() for each in (y, *grads)])
    # Float32 through tens of terms and twenty tokens of a recurrence.
    for expected, got in zip(*results, strict=True):
        assert (got - expected).norm() < 1e-4 * expected.norm()


# Multiplications and additions with the state of one token: by head, by product.
STATE_PRODUCTS = {
    # Written and read: 4 channels by 3 of the state in 2 heads.
    "mamba2": 2 * (4 * 3 + 4 * 3),
    # What is held at the key, written, read: 3 by 2 in 2 heads.
    "gated_deltanet": 2 * 3 * (3 * 2),
    # One matrix, three, four, of 3 by 3 in 2 heads.
    "rnn": 2 * 9,
    "gru": 2 * 3 * 9,
    "lstm": 2 * 4 * 9,
    "linear_attention": 2 * 2 * (3 * 2),
    # The state times a matrix of 2 by 2, written, read.
    "m2rnn": 2 * (3 * 2 * 2 + 3 * 2 + 3 * 2),
    "causal_convolution": 0,
}


@pytest.mark.parametrize(("name", "config"), CONFIGS.items(), ids=CONFIGS)
def test_flops_are_those_of_the_products(name, config, build_mixer):
    mixer = build_mixer(config)
    # Each weight of a linear layer or a convolution is one multiplication and one addition a token.
    weights = [m.weight for m in mixer.modules() if isinstance(m, torch.nn.Linear)]
    if mixer.convolution is not None:
        weights.append(mixer.convolution.weight)
    expected = 2 * (sum(weight.numel() for weight in weights) + STATE_PRODUCTS[name])
    settings = GPTBaseConfig(
        hidden_size=12, position_embedding_type="nope", sequence_mixer_blocks=(config,)
    )
    assert [config.forward_flops(settings, S) for S in (1, 1000)] == [expected] * 2


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_flops_are_those_that_torch_counts(name, build_mixer, random_input):
    config = CONFIGS[name]
    mixer = build_mixer(config)
    with FlopCounterMode(display=False) as counter:
        mixer(random_input(2, 5), NONE, None)
    settings = GPTBaseConfig(
        hidden_size=12, position_embedding_type="nope", sequence_mixer_blocks=(config,)
    )
    # The depthwise convolution is made of elementwise products, which the counter leaves out.
    convolution = 0 if mixer.convolution is None else 2 * mixer.convolution.weight.numel()
    assert counter.get_total_flops() / 10 == config.forward_flops(settings, 5) - convolution

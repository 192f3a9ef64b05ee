"""Kernels of the gated delta rule: many chunks, hard systems, and the sizes of models."""

import pytest
import torch

from lme_kernels.functional import gated_delta_rule
from lme_kernels.op import UnsupportedBackendError
from lme_kernels.ops.gated_delta_rule import GATED_DELTA_RULE
from lme_kernels.ops.gated_delta_rule.settings import (
    KERNELS,
    DeltaSettings,
    delta_candidates,
    delta_settings,
    using_delta,
)
from lme_kernels.packing import cu_seqlens_from_lengths
from lme_kernels.testing import (
    assert_matches,
    check_against_reference,
    device_for,
    dtypes_for,
    fused_backends,
    run,
)

BACKENDS = [
    pytest.param(each, marks=[pytest.mark.gpu] if device_for(each).type != "cpu" else [])
    for each in fused_backends(GATED_DELTA_RULE)
]


def inputs(tokens, heads, K, V, *, slowest=0.2, strongest=1.0):
    """Random inputs; `heads` are those of query, key, value and gates."""
    query, key, value = (
        torch.randn(*tokens, count, size) for count, size in zip(heads, (K, K, V), strict=False)
    )
    N = heads[3]
    # From head to head the memory gets shorter.
    log_decay = -torch.randn(*tokens, N).abs() * slowest * torch.logspace(0, 1, N)
    return query, key, value, log_decay, torch.randn(*tokens, N).sigmoid() * strongest


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_walks_of_many_chunks_match_float64(backend):
    # Empty ones at both ends; past two chunks of any dtype; less than one; strong writing, whose
    # eigenvalue is negative; queries, keys and values shared by different groups of heads.
    arguments = inputs((170,), (1, 2, 1, 2), 16, 8, strongest=2.0)
    for dtype in dtypes_for(backend):
        check_against_reference(
            gated_delta_rule,
            arguments,
            {
                "cu_seqlens": cu_seqlens_from_lengths(torch.tensor([0, 137, 0, 33, 0])),
                "initial_state": torch.randn(5, 2, 16, 8),
                "return_final_state": True,
            },
            backend=backend,
            dtype=dtype,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_decays_of_any_strength_overflow_nothing(backend):
    # The sum over a chunk is far below what float32 can be the exponential of.
    query, key, value, log_decay, beta = inputs((1, 70), (1, 1, 1, 1), 16, 16)
    log_decay[:, ::7] = -50.0
    arguments = [each.to(device_for(backend)) for each in (query, key, value, log_decay, beta)]
    ours = run(gated_delta_rule, arguments, {"backend": backend})
    theirs = run(gated_delta_rule, arguments, {"backend": "torch"})
    wide = run(gated_delta_rule, [each.double() for each in arguments], {"backend": "torch"})
    for mine, other, exact in zip(
        (*ours.outputs, *ours.gradients),
        (*theirs.outputs, *theirs.gradients),
        (*wide.outputs, *wide.gradients),
        strict=True,
    ):
        assert_matches(mine, other, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decay_of_nothing_gets_no_gradient_in_float32(backend):
    # Before the first token there is nothing to decay. Of a difference of sums over all pairs of
    # later tokens rounding would be left.
    arguments = [each.to(device_for(backend)) for each in inputs((1, 40), (1,) * 4, 16, 16)]
    gradients = run(gated_delta_rule, arguments, {"backend": backend}).gradients
    assert gradients[3][0, 0, 0] == 0.0
    assert gradients[3][0, 1:].abs().min() > 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_keys_are_solved_by_substitution_not_by_powers(backend):
    # With one key for all tokens, strength 1 and no decay, a token keeps exactly the last value;
    # powers of this system reach 10^18 and would leave no digit.
    key = torch.ones(1, 64, 1, 16) * 0.25
    value, ones = torch.randn(1, 64, 1, 16), torch.ones(1, 64, 1)
    arguments = [each.to(device_for(backend)) for each in (key, key, value, ones * 0.0, ones)]
    y = gated_delta_rule(*arguments, scale=1.0, l2_normalize=False, backend=backend)
    assert_matches(y, arguments[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_the_last_state_alone_is_that_of_the_reference(backend):
    arguments = [each.to(device_for(backend)) for each in inputs((1, 40), (1, 1, 1, 1), 16, 16)]

    def last(*tensors, backend):
        return gated_delta_rule(*tensors, return_final_state=True, backend=backend)[1]

    def gradients(tensors, backend):
        # The last state takes no part of the queries.
        return run(last, tensors, {"backend": backend}, constants=(0,)).gradients

    ours, theirs = (gradients(arguments, each) for each in (backend, "torch"))
    exact = gradients([each.double() for each in arguments], "torch")
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert_matches(mine, other, true)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_keeps_the_state_and_its_gradient(backend):
    where = device_for(backend)
    initial = torch.randn(2, 1, 16, 16, device=where)
    empty = torch.randn(2, 0, 1, 16, device=where)
    gates = torch.randn(2, 0, 1, device=where)
    arguments = (empty, empty, empty, gates, gates, initial)

    def last(query, key, value, log_decay, beta, initial, backend):
        return gated_delta_rule(
            query,
            key,
            value,
            log_decay,
            beta,
            initial_state=initial,
            return_final_state=True,
            backend=backend,
        )

    ours, theirs = (run(last, arguments, {"backend": each}) for each in (backend, "torch"))
    assert torch.equal(ours.outputs[1], initial)
    assert torch.equal(ours.gradients[-1], theirs.gradients[-1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("K", "V", "dtype"), [(257, 16, torch.float16), (16, 129, torch.float32)])
def test_heads_that_do_not_fit_are_refused_with_the_reason(backend, K, V, dtype):
    tensors = [each.to(device_for(backend), dtype) for each in inputs((1, 2), (1,) * 4, K, V)]
    with pytest.raises(UnsupportedBackendError, match=f"heads have {K} and {V} channels"):
        gated_delta_rule(*tensors, backend=backend)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_settings_by_rule_are_among_the_candidates_and_can_be_fixed(kernel, dtype):
    for K, V in ((64, 64), (128, 128)):
        for rows in (8, 32, 1024):
            by_rule = delta_settings(kernel, dtype, K, V, rows)
            assert by_rule in delta_candidates(kernel, dtype, K, V)
    fixed = DeltaSettings(16, 2, 1)
    with using_delta(kernel, fixed):
        assert delta_settings(kernel, dtype, 128, 128, 32) == fixed
    assert delta_settings(kernel, dtype, 128, 128, 32) != fixed


@pytest.mark.gpu
@pytest.mark.parametrize("K", [64, 128, 256])
@pytest.mark.parametrize("slowest", [0.2, 0.01])
def test_batches_of_models_match_float64(K, slowest):
    arguments = inputs((2, 2048), (16, 16, 16, 16), K, K, slowest=slowest)
    check_against_reference(
        gated_delta_rule, arguments, backend="triton", dtype=torch.bfloat16, where="cuda"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_documents_of_models_match_float64(dtype):
    lengths = torch.tensor([1, 0, 1500, 64, 65, 700, 0, 1766])
    arguments = inputs((4096,), (4, 4, 8, 8), 128, 128)
    check_against_reference(
        gated_delta_rule,
        arguments,
        {
            "cu_seqlens": cu_seqlens_from_lengths(lengths).cuda(),
            "initial_state": torch.randn(8, 8, 128, 128),
            "return_final_state": True,
        },
        backend="triton",
        dtype=dtype,
        where="cuda",
    )


@pytest.mark.gpu
def test_wide_blocks_where_sequences_are_many_match_float64():
    arguments = inputs((16, 256), (8, 8, 16, 16), 128, 128)
    check_against_reference(
        gated_delta_rule, arguments, backend="triton", dtype=torch.bfloat16, where="cuda"
    )

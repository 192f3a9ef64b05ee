import warnings

import pytest
import torch

from lme_kernels.aliases import ALIASES, NAMES
from lme_kernels.functional import ALL_OPS, attention, rmsnorm
from lme_kernels.op import UnsupportedBackendError
from lme_kernels.ops.attention import ATTENTION
from lme_kernels.ops.rmsnorm import RMSNORM
from lme_kernels.ops.swiglu_packed import SWIGLU_PACKED
from lme_kernels.policy import Choice, KernelArgs, KernelPolicy

# As lm-engine and its README write them.
SEED_NAMES = [
    "causal_conv1d",
    "continuous_count",
    "cross_entropy",
    "fused_linear_cross_entropy",
    "gru",
    "pack_sequence",
    "unpack_sequence",
    "rmsnorm",
    "rmsnorm_memory_efficient",
    "rnn",
    "scattermoe",
    "swiglu_packed",
    "linear_attention",
    "m2rnn",
    "quack_gemm",
    "quack_gemm_act",
    "quack_gemm_gated",
    "quack_rmsnorm",
    "coda_linear_cross_entropy",
    "coda_linear_swiglu",
    "flash_attention_2",
    "flash_attention_3",
    "mamba2_ssm",
    "sonicmoe",
    "flash_attention_4",
    "flash_attention_2_deterministic",
    "flash_attention_3_deterministic",
    "flash_attention_4_deterministic",
    "swiglu",
]


def policy(*kernels):
    return KernelPolicy.from_args(KernelArgs(kernels=list(kernels)))


def test_an_absent_section_is_automatic_for_every_op():
    assert KernelPolicy.from_args(KernelArgs()) == KernelPolicy()
    assert KernelPolicy().bind(RMSNORM) is rmsnorm


def test_an_empty_list_runs_the_references_only():
    bound = policy().bind(RMSNORM)
    assert bound.keywords == {"backend": "torch"}
    assert policy().choice("attention") == Choice("torch")


def test_a_list_names_some_and_leaves_the_others_automatic():
    named = policy("rmsnorm@torch", "swiglu")
    assert named.choice("rmsnorm") == Choice("torch")
    assert named.choice("swiglu_packed") == Choice()
    assert named.choice("softmax") == Choice()
    x, weight = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(
        named.bind(RMSNORM)(x, weight, eps=1e-5), rmsnorm(x, weight, eps=1e-5)
    )


def test_swiglu_is_the_gate_of_a_packed_tensor_too():
    assert policy("swiglu@torch").bind(SWIGLU_PACKED).keywords == {"backend": "torch"}


@pytest.mark.parametrize("name", SEED_NAMES)
def test_every_spelling_of_the_seed_is_accepted(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy(name)


def test_a_spelling_without_an_op_of_ours_warns_that_it_has_no_effect():
    with pytest.warns(UserWarning, match="`kernels: quack_gemm` has no effect: matrix products"):
        assert policy("quack_gemm").choices == {}


def test_deterministic_spellings_fix_an_option():
    bound = policy("flash_attention_2_deterministic").bind(ATTENTION)
    assert bound.func is attention
    assert bound.keywords == {"backend": "flash_attention_2", "deterministic": True}


def test_aliases_lead_to_ops_and_every_op_has_its_name():
    targets = {target.op for targets in ALIASES.values() for target in targets}
    assert targets - {None} <= set(NAMES)
    assert set(ALL_OPS) <= set(NAMES)


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        (["rmsnom"], "did you mean `rmsnorm`"),
        (["fused_linear_cross_entropi"], "did you mean `fused_linear_cross_entropy`"),
        (["rmsnorm@tritn"], "`tritn` is no backend; did you mean `triton`"),
        (["rmsnorm@"], "`` is no backend"),
        (["rmsnorm@torch", "rmsnorm"], "has both `rmsnorm@torch` and `rmsnorm`"),
        (["flash_attention_2", "flash_attention_3"], "different implementations of `attention`"),
    ],
)
def test_a_wrong_entry_is_refused_where_it_is_written(kernels, message):
    with pytest.raises(ValueError, match=message):
        KernelArgs(kernels=kernels)


def test_spellings_that_agree_may_stand_together():
    assert policy("rmsnorm", "rmsnorm_memory_efficient", "quack_rmsnorm").choices == {
        "rmsnorm": Choice()
    }


def test_a_backend_that_the_op_lacks_is_refused_when_the_model_is_built():
    with pytest.raises(UnsupportedBackendError, match="`rmsnorm` has no implementation `nki`"):
        policy("rmsnorm@nki").bind(RMSNORM)

"""Other libraries' code for the same calls, imported only if it is installed."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

# Other libraries are not dependencies: their functions have no types here.
Foreign = Callable[..., Any]


def _liger(module: str, function: str) -> Foreign:
    return vars(import_module(f"liger_kernel.ops.{module}"))[function].apply


def _liger_rmsnorm() -> Foreign:
    apply = _liger("rms_norm", "LigerRMSNormFunction")
    # Not in place: it would overwrite the gradient that it is given.
    return lambda x, weight, *, eps: apply(x, weight, eps, 0.0, "llama", False)


def _liger_fused_residual_add_rmsnorm() -> Foreign:
    apply = _liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    return lambda x, residual, weight, *, eps: apply(x, residual, weight, eps, 0.0, "llama", False)


def _liger_layernorm() -> Foreign:
    apply = _liger("layer_norm", "LigerLayerNormFunction")
    return lambda x, weight, bias, *, eps: apply(x, weight, bias, eps)


def _liger_softmax() -> Foreign:
    return _liger("softmax", "LigerSoftmaxFunction")


def _liger_swiglu() -> Foreign:
    return _liger("swiglu", "LigerSiLUMulFunction")


def _liger_geglu() -> Foreign:
    return _liger("geglu", "LigerGELUMulFunction")


def _liger_rope() -> Foreign:
    apply = _liger("rope", "LigerRopeFunction")

    def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        heads_first = (each.transpose(1, 2) for each in (query, key))
        rotated = apply(*heads_first, cos[None], sin[None])
        return tuple(each.transpose(1, 2) for each in rotated)  # type: ignore[return-value]

    return rope


def _liger_cross_entropy() -> Foreign:
    function = import_module("liger_kernel.transformers.functional").liger_cross_entropy
    return lambda logits, labels: function(logits, labels)


def _liger_fused_linear_cross_entropy() -> Foreign:
    functional = import_module("liger_kernel.transformers.functional")
    function = functional.liger_fused_linear_cross_entropy
    return lambda x, weight, labels, *, grad_accum_dtype: function(x, weight, labels)


def _fla_linear_attention() -> Foreign:
    chunk = import_module("fla.ops.simple_gla").chunk_simple_gla
    return lambda query, key, value, *, log_decay=None: chunk(query, key, value, g=log_decay)[0]


def _fla_gated_delta_rule() -> Foreign:
    chunk = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule

    def gated_delta_rule(
        query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor
    ) -> Tensor:
        return chunk(query, key, value, g=log_decay, beta=beta, use_qk_l2norm_in_kernel=True)[0]

    return gated_delta_rule


def _fla_mamba2_ssm() -> Foreign:
    # It has no kernel of its own for Mamba 2: linear attention with a decay a head, fed as its
    # recurrence says.
    chunk = import_module("fla.ops.simple_gla").chunk_simple_gla

    def mamba2_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor) -> Tensor:
        query, key = (each.repeat_interleave(x.shape[2] // each.shape[2], 2) for each in (C, B))
        value = x * dt[..., None].to(x.dtype)
        y = chunk(query, key, value, g=dt.float() * A.float(), scale=1.0)[0]
        return y + D[:, None].to(x.dtype) * x

    return mamba2_ssm


def _fla_causal_conv1d() -> Foreign:
    function = import_module("fla.modules.convolution").causal_conv1d
    return lambda x, weight, bias, *, activation: function(x, weight, bias, activation=activation)[
        0
    ]


def _mamba_ssm() -> Foreign:
    module = import_module("mamba_ssm.ops.triton.ssd_combined")
    combined = module.mamba_chunk_scan_combined
    return lambda x, dt, A, B, C, *, D: combined(x, dt, A, B, C, chunk_size=256, D=D)


def _causal_conv1d() -> Foreign:
    function = import_module("causal_conv1d").causal_conv1d_fn

    def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str) -> Tensor:
        return function(x.transpose(1, 2), weight, bias, activation=activation).transpose(1, 2)

    return causal_conv1d


def _quack_rmsnorm() -> Foreign:
    function = import_module("quack").rmsnorm
    return lambda x, weight, *, eps: function(x, weight, eps=eps)


# By package, by op, what loads a function with the arguments of the op's calls here.
PEERS: Mapping[str, Mapping[str, Callable[[], Foreign]]] = {
    "liger_kernel": {
        "rmsnorm": _liger_rmsnorm,
        "fused_residual_add_rmsnorm": _liger_fused_residual_add_rmsnorm,
        "layernorm": _liger_layernorm,
        "softmax": _liger_softmax,
        "swiglu": _liger_swiglu,
        "geglu": _liger_geglu,
        "rope": _liger_rope,
        "cross_entropy": _liger_cross_entropy,
        "fused_linear_cross_entropy": _liger_fused_linear_cross_entropy,
    },
    "fla": {
        "linear_attention": _fla_linear_attention,
        "gated_delta_rule": _fla_gated_delta_rule,
        "mamba2_ssm": _fla_mamba2_ssm,
        "causal_conv1d": _fla_causal_conv1d,
    },
    "mamba_ssm": {"mamba2_ssm": _mamba_ssm},
    "causal_conv1d": {"causal_conv1d": _causal_conv1d},
    "quack": {"rmsnorm": _quack_rmsnorm},
}


def installed_peers(op: str) -> list[str]:
    """List the packages here that can run an op's calls.

    Args:
        op: Name of the op.

    Returns:
        Names of packages.
    """
    return [
        package
        for package, functions in PEERS.items()
        if op in functions and find_spec(package) is not None
    ]

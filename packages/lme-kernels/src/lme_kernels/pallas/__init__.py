"""Ops of this package for jax, in Pallas kernels for TPUs; needs the `jax` extra.

The functions take jax arrays and the keywords of the torch functions of the same names, and can be
differentiated, compiled and, under `jax.jit`, mixed with anything of jax. Nothing else in
`lme_kernels` imports this package except the back ends of these ops for torch tensors on a TPU.
"""

from lme_kernels.pallas.causal_conv1d import causal_conv1d
from lme_kernels.pallas.linear_attention import linear_attention
from lme_kernels.pallas.rmsnorm import rmsnorm
from lme_kernels.pallas.swiglu import swiglu

__all__ = ["causal_conv1d", "linear_attention", "rmsnorm", "swiglu"]

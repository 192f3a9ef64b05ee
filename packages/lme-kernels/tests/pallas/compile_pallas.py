"""Turn the Pallas kernels into programs for a TPU, forward and backward.

`compile_pallas.py lower` needs jax alone and stops at the program that is given to the TPU's
compiler; `compile_pallas.py compile` runs that too and needs the package `libtpu`, but no TPU.
"""

import os
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path


def prepare(how):
    """Set what jax and libtpu read when they start: the CPU, and a host with four TPUs v5e."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if how == "compile":
        library = Path(find_spec("libtpu").origin).with_name("libtpu.so")
        os.environ |= {
            "TPU_LIBRARY_PATH": str(library),
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
        }


def calls():
    """Name, function, and shapes of the arguments in bfloat16, of sizes of models and odd ones."""
    import jax.numpy as jnp

    from lme_kernels import pallas

    def convolve(x, weight, bias, state, **options):
        return pallas.causal_conv1d(
            *(x, weight, bias),
            initial_state=state,
            activation="silu",
            return_final_state=True,
            interpret=False,
            **options,
        )

    def attend(query, key, value, log_decay=None, state=None, **options):
        return pallas.linear_attention(
            *(query, key, value),
            log_decay=log_decay,
            initial_state=state,
            return_final_state=True,
            interpret=False,
            **options,
        )

    swiglu, rmsnorm = (partial(each, interpret=False) for each in (pallas.swiglu, pallas.rmsnorm))
    cu_seqlens = jnp.array([0, 0, 100, 300, 300, 600])
    heads = ((2, 512, 4, 128), (2, 512, 2, 128), (2, 512, 4, 128))
    packed = ((600, 4, 64), (600, 2, 64), (600, 4, 64), (600, 4), (5, 4, 64, 64))
    return [
        ("swiglu", swiglu, [(4096, 14336)] * 2),
        ("swiglu, odd", swiglu, [(37, 129)] * 2),
        ("rmsnorm", rmsnorm, [(4096, 4096), (4096,)]),
        ("rmsnorm, odd", rmsnorm, [(300, 129), (129,)]),
        ("convolution", convolve, [(2, 1024, 512), (512, 4), (512,), (2, 512, 3)]),
        (
            "convolution, packed",
            partial(convolve, cu_seqlens=cu_seqlens),
            [(600, 200), (200, 4), (200,), (5, 200, 3)],
        ),
        ("attention", attend, heads),
        ("attention, decay a channel", attend, [*heads, (2, 512, 4, 128)]),
        ("attention, packed", partial(attend, cu_seqlens=cu_seqlens), packed),
        (
            "attention, odd",
            partial(attend, inclusive=False),
            [(1, 33, 2, 9), (1, 33, 1, 9), (1, 33, 2, 20), (1, 33, 2)],
        ),
    ]


def main(how):
    prepare(how)
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    sharding = None
    if how == "compile":
        there = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
        sharding = jax.sharding.SingleDeviceSharding(there.devices[0])

    def differentiate(function, *inputs):
        outputs, pull = jax.vjp(function, *inputs)
        return outputs, pull(jax.tree.map(jnp.ones_like, outputs))

    for name, function, shapes in calls():
        inputs = [jax.ShapeDtypeStruct(each, jnp.bfloat16, sharding=sharding) for each in shapes]
        traced = jax.jit(partial(differentiate, function)).trace(*inputs)
        if how == "compile":
            traced.lower().compile()
        else:
            text = traced.lower(lowering_platforms=("tpu",)).as_text()
            # Kernels are calls of the TPU's own, not interpreted.
            assert text.count("tpu_custom_call") >= 2, name
        print(f"{name}: ok")


if __name__ == "__main__":
    main(sys.argv[1])

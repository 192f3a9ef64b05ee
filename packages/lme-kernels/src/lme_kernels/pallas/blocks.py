"""How the Pallas kernels cut arrays, and whether they are interpreted."""

import jax
import jax.numpy as jnp
from jax import Array

# Elements of a row of a vector register; its rows are 8 for 4 bytes an element, 16 for 2.
LANES = 128
# Bytes that the blocks of one kernel may take together: half of the 16 MiB that a TPU core's
# compiler grants, the rest is for what the kernel computes on the way.
BLOCK_BYTES = 8 << 20


def resolve_interpret(interpret: bool | None) -> bool:
    """Decide whether a kernel is interpreted.

    Args:
        interpret: As a caller gave it; `None` interprets unless jax's default backend is a TPU.

    Returns:
        Whether to interpret.
    """
    return jax.default_backend() != "tpu" if interpret is None else interpret


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype to compute in for arrays of `dtype`: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def sublanes(dtype: jnp.dtype) -> int:
    """Return the number of rows of a vector register for elements of `dtype`."""
    return max(8, 32 // jnp.dtype(dtype).itemsize)


def block_of(size: int, most: int, multiple: int) -> int:
    """Choose the length of a block along one dim.

    Args:
        size: Length of the dim, at least 1.
        most: Longest block that is wanted.
        multiple: What a block that does not span the dim must be a multiple of.

    Returns:
        `size` itself if it is short enough, else the largest multiple up to `most`, at least one.
    """
    return size if size <= most else max(multiple, most // multiple * multiple)


def rows_of_block(x: Array, num_arrays: int) -> int:
    """Choose how many whole rows a block holds, so that all blocks fit on chip twice.

    Args:
        x: Rows, shape (rows, H), at least one.
        num_arrays: Number of arrays that are read, written or computed in blocks of rows.

    Returns:
        A number of rows; a multiple of `sublanes(x.dtype)`, or all of them.
    """
    row_bytes = x.shape[1] * compute_dtype(x.dtype).itemsize
    # Each block is there twice: one is copied while the other is computed.
    most = BLOCK_BYTES // (2 * num_arrays * row_bytes)
    return block_of(x.shape[0], min(most, 512), sublanes(x.dtype))

"""Tensors walked as rows, whatever their strides: copied only where there is no other way."""

from torch import Tensor


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """Return `x`, or a copy if need be, as rows of unit stride, and the stride between rows.

    Args:
        x: Shape (..., columns).

    Returns:
        A tensor whose row r starts r times the stride after its first element.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.ndim >= 2 and x.stride(-1) == 1:
        stride = x.stride(-2)
        expected = stride * x.shape[-2]
        for dim in range(x.ndim - 3, -1, -1):
            if x.stride(dim) != expected:
                return x.contiguous(), x.shape[-1]
            expected *= x.shape[dim]
        if stride >= x.shape[-1]:
            return x, stride
    return x.contiguous(), x.shape[-1]


def num_rows(x: Tensor) -> int:
    """Count the rows of `x`, whose last dimension is not empty."""
    return x.numel() // x.shape[-1]


def as_matrices(*tensors: Tensor) -> tuple[list[Tensor], list[int], int, int]:
    """Walk tensors of one shape together, as one long row where their layout allows it.

    Args:
        tensors: Tensors of the same shape, not empty.

    Returns:
        The tensors or copies of them, their row strides, the number of rows and of columns.
    """
    first = tensors[0]
    if all(each.is_contiguous() for each in tensors):
        return list(tensors), [0] * len(tensors), 1, first.numel()
    pairs = [as_rows(each) for each in tensors]
    rows = num_rows(first)
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs], rows, first.shape[-1]


def has_whole_rows(x: Tensor, dims: int) -> bool:
    """Say whether what follows the first `dims` dimensions of `x`, not empty, is contiguous."""
    return x.stride(-1) == 1 and x[(0,) * dims].is_contiguous() if x.ndim > dims else True

"""Thin launches of Triton kernels: what counts as the same call, and results that do not change."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from lme_kernels._triton_launch import _kind, thin_launch


def test_calls_that_specialise_a_kernel_differently_are_told_apart():
    x = torch.zeros(64)
    kinds = [
        _kind(each) for each in (None, x, x[1:], x.half(), 1, 2, 16, 2**31, 2**31 + 1, True, 1.0)
    ]
    assert len(set(kinds)) == len(kinds)


def test_calls_that_specialise_a_kernel_alike_are_not():
    x = torch.zeros(64)
    assert _kind(x) == _kind(x[4:]) == _kind(torch.zeros(3, 5))
    assert _kind(3) == _kind(7) == _kind(-5)
    assert _kind(32) == _kind(16)
    assert _kind(0.5) == _kind(2.0)


@pytest.mark.gpu
def test_launches_of_every_kind_give_the_same():
    @thin_launch
    @triton.jit
    def shift(x_ptr, y_ptr, other_ptr, n, by, scale, HAS_OTHER: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x_ptr + at, mask=at < n, other=0.0) * scale + by
        if HAS_OTHER:
            value += tl.load(other_ptr + at, mask=at < n, other=0.0)
        tl.store(y_ptr + at, value, mask=at < n)

    base = torch.randn(4096, device="cuda")
    for _ in range(3):
        for begin, n in ((0, 1024), (1, 1024), (1, 1000), (3, 1), (16, 1040), (5, 17)):
            for other in (None, base[2:], base):
                for by, dtype in ((1, torch.float32), (16, torch.float32), (2**33, torch.float64)):
                    x = base[begin:].to(dtype)
                    y = torch.zeros(n, device="cuda", dtype=dtype)
                    grid = (-(-n // 256),)
                    settings = {"HAS_OTHER": other is not None, "BLOCK": 256, "num_warps": 4}
                    shift[grid](x, y, other, n, by, 0.5, **settings)
                    expected = x[:n] * 0.5 + by
                    if other is not None:
                        expected = expected + other[:n]
                    torch.testing.assert_close(y, expected)
    # Each of the calls was compiled once at most.
    assert 1 < len(shift._compiled) <= 6 * 3 * 3

import threading

import pytest
import torch

from lme_kernels.functional import ALL_OPS, rmsnorm, softmax
from lme_kernels.inspection import count_calls, explain, table


def test_explain_gives_each_implementation_its_reason_and_chooses_one():
    entries = explain("rmsnorm", torch.randn(2, 4, dtype=torch.float64), None)
    assert [entry.backend for entry in entries][-1] == "torch"
    assert [entry.backend for entry in entries if entry.chosen] == ["torch"]
    reasons = {entry.backend: entry.why_not for entry in entries}
    assert reasons["torch"] is None
    assert "float64" in reasons["triton"] or "interpreter" in reasons["triton"]


def test_explain_refuses_what_it_cannot_explain():
    with pytest.raises(ValueError, match="there is no op `rmsnom`"):
        explain("rmsnom", torch.randn(2))
    with pytest.raises(ValueError, match="needs the call's tensors"):
        explain("rmsnorm")


def test_the_table_has_a_row_an_op():
    rows = table().splitlines()
    assert len(rows) == 2 + len(ALL_OPS)
    assert rows[0] == "| op | torch | triton | cuda | pallas | nki | others |"
    assert any(row.startswith("| `rmsnorm` | yes | yes |") for row in rows)
    assert any(
        row.startswith("| `attention` | yes |") and "sdpa, flash_varlen, flex" in row
        for row in rows
    )


def test_calls_are_counted_by_implementation_in_this_thread_only():
    x = torch.randn(2, 4)
    elsewhere = threading.Thread(target=lambda: softmax(x))
    with count_calls() as outer:
        rmsnorm(x, None)
        with count_calls() as inner:
            rmsnorm(x, None, backend="torch")
            elsewhere.start()
            elsewhere.join()
        softmax(x)
    rmsnorm(x, None)
    assert inner == {"rmsnorm@torch": 1}
    assert outer == {"rmsnorm@torch": 1, "softmax@torch": 1}


def test_counting_ends_when_the_block_raises():
    with pytest.raises(KeyError), count_calls() as counts:
        raise KeyError
    rmsnorm(torch.randn(2, 4), None)
    assert not counts

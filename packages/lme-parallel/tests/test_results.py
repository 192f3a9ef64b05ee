"""Results of test processes come back bit for bit, and without code."""

import pytest
import torch

from lme_parallel.results import read_result, write_result

RESULTS = {
    "tensors": [
        torch.randn(3, 2, dtype=torch.float64),
        torch.randn(5).to(torch.bfloat16),
        torch.tensor(float("nan")),
        torch.tensor([True, False]),
        torch.arange(6).reshape(2, 3).T,
        torch.empty(0, 4),
    ],
    "containers": {"a": (1, [2.5, None, "text"], {}), 3: True, ("x", 0): float("inf")},
}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(
                one.contiguous().reshape(-1).view(torch.uint8),
                other.contiguous().reshape(-1).view(torch.uint8),
            )
        )
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_comes_back_as_it_was(name, tmp_path):
    write_result(tmp_path / "result", RESULTS[name])
    assert same(read_result(tmp_path / "result"), RESULTS[name])


def test_what_is_no_plain_value_is_refused(tmp_path):
    with pytest.raises(TypeError, match="cannot return object; return plain values"):
        write_result(tmp_path / "result", {"a": [object()]})

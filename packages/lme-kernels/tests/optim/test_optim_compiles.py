"""The kernels over tables of tensors compile for a GPU, which is not needed for that."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lme_kernels.optim.tables import CHUNK, make_table


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.slow
def test_every_kernel_compiles_with_loads_of_sixteen_bytes(tmp_path):
    script = Path(__file__).with_name("compile_optim.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, str(script), "cuda:90"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert {name for name, _ in lines} == {
        "_adamw_kernel",
        "_count_kernel",
        "_squares_kernel",
        "_root_kernel",
        "_scale_kernel",
        "_write_kernel",
    }
    moving = ("_adamw_kernel", "_squares_kernel", "_scale_kernel")
    assert {width for name, width in lines if name in moving} == {"128"}


def test_numbers_carried_by_launches_arrive():
    _triton_tables = pytest.importorskip("lme_kernels.optim._triton_tables")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where a GPU is; captured graphs prove it there")
    numbers = tuple(range(0, 70 * 2**40, 2**40))
    target = torch.full((72,), -1)
    _triton_tables.write_numbers(target[:70], numbers)
    assert target.tolist() == [*numbers, -1, -1]


def test_a_table_says_where_chunks_end_and_whether_all_is_aligned():
    table = make_table(
        [CHUNK + 1, 0, 5],
        [[16, 32, 48]],
        torch.device("cpu"),
        others=([7, 8, 9],),
        write=lambda target, numbers: None,
    )
    assert table.values.tolist() == [[2, 2, 3], [CHUNK + 1, 0, 5], [16, 32, 48], [7, 8, 9]]
    assert (table.tensors, table.chunks, table.is_aligned) == (3, 3, True)
    odd = make_table([1], [[8]], torch.device("cpu"), write=lambda target, numbers: None)
    assert not odd.is_aligned

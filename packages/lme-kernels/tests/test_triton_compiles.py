"""Every Triton kernel compiles for a GPU, which is not needed for that."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lme_kernels.functional import ALL_OPS


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.slow
def test_every_kernel_of_every_op_compiles_for_a_gpu(tmp_path):
    script = Path(__file__).with_name("compile_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, str(script), "cuda:90"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    compiled = {line.split()[1]: line.split()[2:] for line in result.stdout.splitlines()}
    assert set(compiled) == {op.name for op in ALL_OPS.values() if "triton" in op.implementations}
    assert all(len(kernels) >= 1 for kernels in compiled.values())

"""The kernels of linear attention fit a GPU at the sizes of models, which is not needed for that."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# What a program may have on an H100.
SHARED_BYTES = 227 * 1024


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.slow
def test_kernels_of_models_compile_and_fit_into_shared_memory(tmp_path):
    script = Path(__file__).with_name("compile_linear_attention.py")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(script.parents[1]),
    }
    result = subprocess.run(
        [sys.executable, str(script), "cuda:90"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    shared = [line.split() for line in result.stdout.splitlines()]
    assert {name for name, _ in shared} == {
        "_decay_kernel",
        "_channel_decay_kernel",
        "_walk_kernel",
        "_states_kernel",
        "_outputs_kernel",
        "_gradients_kernel",
        "_scores_kernel",
        "_channel_gradients_kernel",
    }
    for name, size in shared:
        assert int(size) <= SHARED_BYTES, name

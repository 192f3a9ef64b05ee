"""The kernels become programs for a TPU, which need not be there."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_pallas.py")


@pytest.mark.timeout(300)
def test_every_kernel_becomes_a_program_for_a_tpu():
    # In a process of its own: the compiler's settings are read when jax starts.
    how = "compile" if find_spec("libtpu") is not None else "lower"
    result = subprocess.run([sys.executable, SCRIPT, how], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert len(result.stdout.splitlines()) == 10

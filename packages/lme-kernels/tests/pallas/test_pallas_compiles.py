"""The kernels become programs for a TPU, which need not be there."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import lme_kernels

SCRIPT = Path(__file__).with_name("compile_pallas.py")


@pytest.mark.timeout(300)
def test_every_kernel_becomes_a_program_for_a_tpu():
    # In a process of its own: the compiler's settings are read when jax starts.
    how = "compile" if find_spec("libtpu") is not None else "lower"
    result = subprocess.run([sys.executable, SCRIPT, how], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert len(result.stdout.splitlines()) == 10


def test_only_back_ends_import_what_needs_jax():
    """So that everything else works where jax is not installed."""
    package = Path(lme_kernels.__file__).parent
    for file in package.rglob("*.py"):
        inside = file.relative_to(package)
        if inside.parts[0] == "pallas" or file.name.startswith("_pallas"):
            continue
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
            for name in names:
                assert name.split(".")[0] != "jax", inside
                assert not name.startswith("lme_kernels.pallas"), inside

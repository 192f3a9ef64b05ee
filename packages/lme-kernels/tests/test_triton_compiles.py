"""Every Triton kernel compiles for a GPU, which is not needed for that."""

import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lme_kernels.functional import ALL_OPS

# What a program may have on an H100.
SHARED_BYTES = 227 * 1024


def compiled(folder, *arguments):
    """What `compile_triton.py` prints, line by line and word by word."""
    script = Path(__file__).with_name("compile_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [line.split() for line in result.stdout.splitlines()]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.slow
def test_every_kernel_of_every_op_compiles_and_fits_a_gpu(tmp_path):
    lines = compiled(tmp_path, "cuda:90")
    launched = {name: kernels for kind, name, *kernels in lines if kind == "op"}
    assert set(launched) == {op.name for op in ALL_OPS.values() if "triton" in op.implementations}
    assert all(len(kernels) >= 1 for kernels in launched.values())
    kernels = [line[1:] for line in lines if line[0] == "kernel"]
    binaries = {name for name, last, *_ in kernels if last == "binary"}
    assert binaries >= {each for names in launched.values() for each in names}
    for name, _, size, shared, spilled, races in kernels:
        # What is not looked for is -1.
        assert int(shared) <= SHARED_BYTES, (name, size)
        # A few words are spilled and read back outside of loops at most; heads of 256 are slow.
        assert int(spilled) <= (32 if int(size) <= 128 else 1024), (name, size)
        assert int(races) <= 0, (name, size)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.slow
def test_chunked_recurrences_take_what_they_say_on_gpus_before_hopper(tmp_path):
    from lme_kernels._triton_chunks import shared_bytes

    lines = compiled(tmp_path, "cuda:80", "models")
    found = [(int(size), int(shared)) for _, _, _, size, shared, *_ in lines]
    assert max(size for size, _ in found) == 256
    for size, shared in found:
        assert shared <= shared_bytes(size), (size, shared)


LOOP = """
  %values = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x64x64xbf16, #shared, #smem, mutable>
  %first = ttg.memdesc_index %values[%c0] : !ttg.memdesc<{buffers}x64x64xbf16>
  %copied = ttg.async_copy_global_to_local %pointers, %first mask %mask
  %result = scf.for %i = %c0 to %n step %c1 iter_args(%sum = %zero) -> (tensor<64x64xf32>) : i32 {{
    %value = ttg.memdesc_index %values[%i] : !ttg.memdesc<{buffers}x64x64xbf16>
    %product = ttng.warp_group_dot %left, %value, %sum {{isAsync = true}} : tensor<64x64xf32>
    {wait}
    %next = ttg.memdesc_index %values[%j] : !ttg.memdesc<{buffers}x64x64xbf16>
    %more = ttg.async_copy_global_to_local %pointers, %next mask %mask
    scf.yield %product : tensor<64x64xf32>
  }} loc(#loc)
"""
ALL = "%done = ttng.warp_group_dot_wait %product {pendings = 0 : i32} : tensor<64x64xf32>"
ALL_BUT_ONE = ALL.replace("pendings = 0", "pendings = 1")


@pytest.mark.parametrize(
    ("buffers", "wait", "racing"),
    [
        # The next tile is loaded over the one that is read, or not before that ends.
        (1, "", ["%values"]),
        (1, ALL, []),
        (1, ALL_BUT_ONE, ["%values"]),
        # The next tile is loaded over the last one.
        (2, "", ["%values"]),
        (2, ALL, []),
        (2, ALL_BUT_ONE, []),
    ],
)
def test_a_tile_that_is_overwritten_too_early_is_found(buffers, wait, racing):
    races = runpy.run_path(str(Path(__file__).with_name("shared_memory_races.py")))["races"]
    assert races(LOOP.format(buffers=buffers, wait=wait)) == racing

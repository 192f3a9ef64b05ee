"""`lme unshard` holds one tensor at a time, however large the model is."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lme_core.config import from_dict, to_dict
from lme_parallel.checkpoint.snapshot import Snapshot, collect_tensors
from lme_parallel.checkpoint.writer import write_checkpoint

MIB = 2**20
TENSORS = 6
ROWS = 40 * MIB // 1024
"""Of 4 KiB each: 160 MiB a tensor, 960 MiB all of them."""
CONFIG = {
    "model_type": "gpt_base",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_layers": 1,
    "sequence_mixer_blocks": [{"num_attention_heads": 2, "num_key_value_heads": 1}],
    "mlp_blocks": [{"activation_function": "swiglu", "intermediate_size": 32}],
}


@pytest.fixture
def roomy_path(tmp_path):
    """In memory where 2 GiB are free there."""
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > 3 * 2**30
    with tempfile.TemporaryDirectory(dir=memory if fits else tmp_path) as folder:
        yield Path(folder)


def anonymous_bytes(process):
    """Memory of a process that no file stands behind; 0 when it is gone."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_peak_is_the_largest_tensor_and_512_mib(roomy_path):
    tensor = torch.arange(ROWS, dtype=torch.float32)[:, None].expand(ROWS, 1024).contiguous()
    assert tensor.nbytes == 160 * MIB
    parameters = {f"layer{number}.weight": torch.nn.Parameter(tensor) for number in range(TENSORS)}
    config = to_dict(from_dict(CONFIG))
    documents = {
        name: json.dumps(content).encode()
        for name, content in (
            ("config.json", config),
            ("run.resolved.json", {}),
            ("state.json", {}),
        )
    }
    saved = collect_tensors(parameters, {}, None)
    write_checkpoint(roomy_path / "run", Snapshot(3, saved, documents), lambda name: None)
    command = [sys.executable, "-m", "lme_cli", "unshard", "run", "model", "--dtype", "bf16"]
    process = subprocess.Popen(
        command,
        cwd=roomy_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.002)
    assert process.returncode == 0, process.communicate()[0]
    # The interpreter and torch are in it too.
    assert 160 * MIB < peak < (160 + 512) * MIB
    files = sorted((roomy_path / "model").glob("*.safetensors"))
    names = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            found = set(opened.keys())
            names |= found
            for name in found:
                part = opened.get_slice(name)
                assert part.get_shape() == [ROWS, 1024]
                assert torch.equal(part[-1:, :], tensor[-1:].bfloat16())
    assert names == set(parameters)

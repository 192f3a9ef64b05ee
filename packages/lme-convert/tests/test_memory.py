import re
import threading
import time
from pathlib import Path

import pytest
import torch

from lme_convert.api import export_to_hf, import_from_hf
from lme_convert.directory import ModelDirectory
from lme_convert.files import write_json
from lme_convert.shards import write_shards

MIB = 1024**2
STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Memory of this process that no file backs: mapped checkpoints do not count."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


def peak_growth(function, baseline: int) -> int:
    """Most anonymous memory above a baseline while `function` ran, sampled every 2 ms.

    The baseline is taken before anything: what an earlier call freed, the allocator may keep.
    """
    peak, done = 0, threading.Event()

    def sample():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        function()
    finally:
        done.set()
        thread.join()
    return peak - baseline


def synthetic_llama(path: Path, hidden_size: int, num_layers: int, max_shard_bytes: int) -> int:
    """Write a Llama of constant bf16 tensors; return its bytes."""
    width, vocab_size = 3 * hidden_size, 16 * hidden_size
    square = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    shapes = {"model.embed_tokens": (vocab_size, hidden_size)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}": (hidden_size, hidden_size) for name in square}
        shapes |= {f"{prefix}.mlp.{name}_proj": (width, hidden_size) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj"] = (hidden_size, width)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{name}"] = (hidden_size,)
    shapes |= {"model.norm": (hidden_size,), "lm_head": (vocab_size, hidden_size)}
    path.mkdir()
    config = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    write_json(path / "config.json", config)
    tensors = (
        (f"{name}.weight", torch.full(shape, float(number), dtype=torch.bfloat16))
        for number, (name, shape) in enumerate(shapes.items())
    )
    write_shards(path, tensors, max_shard_bytes)
    return sum(2 * torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc/self/status, which Linux has")
@pytest.mark.parametrize("shard_bytes", [40 * MIB, 500 * MIB], ids=["shards", "one file"])
def test_memory_is_that_of_one_rule_whatever_the_model(shard_bytes, tmp_path):
    """Well under largest shard + 512 MiB: a rule's tensors, read and rearranged, and small ones."""
    baseline = anonymous_bytes()
    total = synthetic_llama(tmp_path / "theirs", 768, 9, shard_bytes)
    assert total > 160 * MIB
    # Embedding 18 MiB, or gate and up as read, interleaved: 4 x 7 MiB; small tensors kept until
    # they are written, 32 MiB, with a copy of the last; as much again that the allocator keeps.
    allowed = 2 * (28 + 32 + 7) * MIB
    assert allowed < total * 0.85
    theirs, ours, back = (tmp_path / name for name in ("theirs", "ours", "back"))
    imported = peak_growth(
        lambda: import_from_hf(theirs, ours, max_shard_bytes=shard_bytes), baseline
    )
    exported = peak_growth(lambda: export_to_hf(ours, back, max_shard_bytes=shard_bytes), baseline)
    assert imported < allowed
    assert exported < allowed
    first, again = ModelDirectory(theirs), ModelDirectory(back)
    assert again.names == first.names
    assert all(torch.equal(again.tensor(name), first.tensor(name)) for name in first.names)

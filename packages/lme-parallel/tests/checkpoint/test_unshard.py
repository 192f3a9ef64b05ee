from pathlib import Path

import pytest
import torch

from lme_parallel.checkpoint import arrays
from lme_parallel.checkpoint.errors import CheckpointError
from lme_parallel.checkpoint.snapshot import Snapshot, collect_tensors
from lme_parallel.checkpoint.unshard import iterate_tensors, open_checkpoint
from lme_parallel.checkpoint.writer import write_checkpoint
from lme_parallel.testing import run_distributed


def save(run, step, tensors):
    parameters = {
        name: torch.nn.Parameter(each, requires_grad=each.is_floating_point())
        for name, each in tensors.items()
    }
    saved = collect_tensors(parameters, {}, None)
    write_checkpoint(run, Snapshot(step, saved, {}), lambda name: None)


@pytest.fixture
def run(fast_path):
    torch.manual_seed(0)
    save(fast_path, 1, {"b": torch.ones(2), "a": torch.zeros(3)})
    tensors = {"b": torch.randn(5, 3), "a": torch.randn(2), "ids": torch.arange(300)}
    save(fast_path, 2, tensors)
    return fast_path, tensors


@pytest.mark.parametrize("folder", ["", "global_step2"])
def test_tensors_come_one_by_one_in_order_and_as_saved(folder, run):
    path, tensors = run
    found = list(iterate_tensors(path / folder))
    assert [name for name, _ in found] == ["a", "b", "ids"]
    for name, tensor in found:
        assert torch.equal(tensor, tensors[name])


def test_only_floating_tensors_are_converted(run):
    path, tensors = run
    found = dict(iterate_tensors(str(path), torch.bfloat16))
    assert torch.equal(found["b"], tensors["b"].bfloat16())
    # 299 would not survive as bfloat16.
    assert torch.equal(found["ids"], tensors["ids"])


def test_an_earlier_step_is_opened_by_iteration(run):
    path, _ = run
    assert open_checkpoint(path, 1).step == 1
    assert open_checkpoint(path / "global_step1", 1).step == 1


@pytest.mark.parametrize(
    ("folder", "iteration", "reason"),
    [
        ("", 7, "global_step7"),
        ("global_step1", 2, "is not of step 2"),
        ("nowhere", None, "holds no committed checkpoint"),
    ],
)
def test_what_is_not_there_is_an_error(folder, iteration, reason, run):
    path, _ = run
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(path / folder, iteration)


def grow_while_reading(folder):
    def resident():
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssAnon:")[1].split()[0]) * 1024

    # Small chunks and a small window: what is held must not follow the number of tensors.
    arrays.MAX_CHUNK_BYTES = 2**20
    arrays._IN_FLIGHT_BYTES = 2**22
    save(Path(folder), 1, {f"t{index}": torch.randn(1024, 1024) for index in range(24)})
    before, most = resident(), 0
    for _, tensor in iterate_tensors(Path(folder), torch.bfloat16):
        assert tensor.shape == (1024, 1024)
        most = max(most, resident())
    return most - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_follows_the_largest_tensor_and_not_the_model(fast_path):
    (grown,) = run_distributed(grow_while_reading, 1, str(fast_path))
    # A tensor of 4 MB, its copy in bfloat16 and a window of 4 MB; the model has 96 MB.
    assert grown < 24 * 2**20

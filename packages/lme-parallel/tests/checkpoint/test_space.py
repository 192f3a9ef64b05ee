"""A disk that is full gives one clear error and keeps the last checkpoint."""

import os
import resource
from pathlib import Path

import pytest
import torch

from lme_parallel.checkpoint import writer
from lme_parallel.checkpoint.errors import CheckpointError
from lme_parallel.checkpoint.layout import checkpoint_steps
from lme_parallel.checkpoint.reader import newest_valid
from lme_parallel.checkpoint.snapshot import Snapshot, collect_tensors
from lme_parallel.checkpoint.writer import write_checkpoint
from lme_parallel.testing import run_distributed


def snapshot(step, size=1):
    # The first value tells the checkpoints apart.
    parameters = {
        "small": torch.nn.Parameter(torch.full((4,), float(step))),
        "weight": torch.nn.Parameter(torch.randn(size, 1024)),
    }
    return Snapshot(step, collect_tensors(parameters, {}, None), {"state.json": b"{}"})


def save_beyond_the_limit(folder, limit):
    write_checkpoint(Path(folder), snapshot(1), lambda name: None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        write_checkpoint(Path(folder), snapshot(2, size=1024), lambda name: None)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "no error"


# Room for most of a chunk, for metadata only, and for next to nothing.
@pytest.mark.parametrize("limit", [2**20, 1000, 10])
def test_a_write_that_fails_keeps_the_last_checkpoint(limit, fast_path):
    (message,) = run_distributed(save_beyond_the_limit, 1, str(fast_path), limit)
    assert "the checkpoint of step 2 was not saved" in message
    assert "File too large" in message
    assert "earlier checkpoints are unchanged" in message
    # Its space is free again.
    assert checkpoint_steps(fast_path) == [1]
    found = newest_valid(fast_path)
    found.verify()
    assert found.step == 1


def test_a_disk_too_small_is_found_before_anything_is_written(fast_path, monkeypatch):
    write_checkpoint(fast_path, snapshot(1), lambda name: None)
    written = []
    usage = writer.shutil._ntuple_diskusage(2**30, 2**30, 2**20)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        CheckpointError, match=r"needs 0\.00 GiB, but 0\.00 GiB are free.*keep_last"
    ):
        write_checkpoint(fast_path, snapshot(2, size=1024), written.append)
    assert written == ["make run directory"]
    assert checkpoint_steps(fast_path) == [1]


@pytest.mark.parametrize("name", ["write state.json", "sync model/", "commit", "open model/weight"])
def test_an_error_of_the_disk_at_any_step_is_one_error(name, fast_path):
    def point(reached):
        if reached == name:
            raise OSError(28, "No space left on device")

    write_checkpoint(fast_path, snapshot(1), lambda name: None)
    with pytest.raises(CheckpointError, match=r"step 2 was not saved.*No space left"):
        write_checkpoint(fast_path, snapshot(2), point)
    assert checkpoint_steps(fast_path) == [1]
    write_checkpoint(fast_path, snapshot(2), lambda name: None)
    assert newest_valid(fast_path).step == 2


# What a file system that lost data after a sync would show.
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda root: os.truncate(root / "model/weight/c/0/0", 100), "100 bytes after 4100"),
        (lambda root: (root / "model/weight/c/0/0").unlink(), "No such file"),
        (lambda root: os.truncate(root / "model/zarr.json", 0), "0 bytes after"),
        (lambda root: (root / "state.json").unlink(), "No such file"),
    ],
    ids=["cut chunk", "lost chunk", "cut metadata", "lost document"],
)
def test_a_file_lost_before_commit_is_not_committed(damage, reason, fast_path):
    def point(name):
        if name == "collect checksums":
            damage(fast_path / "global_step2")

    write_checkpoint(fast_path, snapshot(1), lambda name: None)
    with pytest.raises(CheckpointError, match=f"step 2 was not saved.*{reason}"):
        write_checkpoint(fast_path, snapshot(2), point)
    assert newest_valid(fast_path).step == 1


def test_a_run_directory_that_is_a_file_is_one_error(fast_path):
    (fast_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="was not saved"):
        write_checkpoint(fast_path / "run", snapshot(1), lambda name: None)

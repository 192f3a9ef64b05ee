"""Damaged and hostile checkpoints end in one typed error, and never touch what is outside."""

import json
import os
import shutil

import pytest
import torch
from google_crc32c import value as crc32c

from lme_parallel.checkpoint.errors import CheckpointError
from lme_parallel.checkpoint.layout import check_array_name
from lme_parallel.checkpoint.reader import Checkpoint, newest_valid
from lme_parallel.checkpoint.snapshot import Snapshot, collect_tensors
from lme_parallel.checkpoint.unshard import iterate_tensors
from lme_parallel.checkpoint.writer import write_checkpoint


@pytest.fixture(scope="module")
def original(fast_root):
    parameters = {
        "a.weight": torch.nn.Parameter(torch.randn(4, 3)),
        "a.bias": torch.nn.Parameter(torch.randn(3)),
    }
    tensors = collect_tensors(parameters, {}, None)
    run = fast_root / "hostile"
    write_checkpoint(run, Snapshot(5, tensors, {"state.json": b"{}"}), lambda name: None)
    return run / "global_step5"


@pytest.fixture
def checkpoint(original, fast_path):
    return shutil.copytree(original, fast_path / "global_step5")


def edit_commit(path, change):
    content = json.loads((path / "COMMIT").read_text())
    change(content)
    (path / "COMMIT").write_text(json.dumps(content))


def rewrite(path, name, content):
    """Change a file and make COMMIT agree, as an attacker would."""
    (path / name).write_bytes(content)
    record = {"size": len(content), "crc32c": crc32c(content)}
    edit_commit(path, lambda commit: commit["files"].update({name: record}))


def edit_metadata(path, **change):
    name = "model/a.weight/zarr.json"
    content = json.loads((path / name).read_text())
    rewrite(path, name, json.dumps({**content, **change}).encode())


CHUNK = "model/a.weight/c/0/0"


def flip_byte(path, name, place):
    content = bytearray((path / name).read_bytes())
    content[place] ^= 1
    (path / name).write_bytes(content)


def link_file(path):
    (path / CHUNK).rename(path / "elsewhere")
    (path / CHUNK).symlink_to(path / "elsewhere")


def link_directory(path):
    (path / "model").rename(path / "elsewhere")
    (path / "model").symlink_to(path / "elsewhere")


def link_checkpoint(path):
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def add_file(path, name):
    def change(commit):
        commit["files"][name] = {"size": 4, "crc32c": 0}

    edit_commit(path, change)


def set_commit(path, **values):
    edit_commit(path, lambda commit: commit.update(values))


def swap_chunks(path):
    # Same size, both with a valid checksum of their own.
    other = json.loads((path / "COMMIT").read_text())["files"]["model/a.bias/c/0"]
    edit_commit(path, lambda commit: commit["files"].update({CHUNK: other}))


def make_fifo(path):
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")


DAMAGE = {
    "no COMMIT": lambda path: (path / "COMMIT").unlink(),
    "COMMIT is empty": lambda path: (path / "COMMIT").write_bytes(b""),
    "COMMIT is cut": lambda path: os.truncate(path / "COMMIT", 40),
    "COMMIT is a list": lambda path: (path / "COMMIT").write_text("[]"),
    "COMMIT is not UTF-8": lambda path: (path / "COMMIT").write_bytes(b"\xff\xfe{}"),
    "COMMIT is nested deeply": lambda path: (path / "COMMIT").write_text("[" * 100_000),
    "COMMIT has a huge number": lambda path: (path / "COMMIT").write_text("9" * 10_000),
    "COMMIT has a key twice": lambda path: (path / "COMMIT").write_text('{"step":5,"step":5}'),
    "COMMIT is of another step": lambda path: set_commit(path, step=6),
    "COMMIT's step is a truth value": lambda path: set_commit(path, step=True),
    "COMMIT is of the future": lambda path: set_commit(path, format_version=99),
    "COMMIT's version is a list": lambda path: set_commit(path, format_version="1"),
    "COMMIT has another key": lambda path: set_commit(path, run="rm -rf"),
    "COMMIT's files are a list": lambda path: set_commit(path, files=[]),
    "a name climbs out": lambda path: add_file(path, "../../outside.json"),
    "a name climbs out of its group": lambda path: add_file(path, "model/../../x/zarr.json"),
    "a name is absolute": lambda path: add_file(path, "/etc/passwd"),
    "a name has a null byte": lambda path: add_file(path, "a\0.json"),
    "a name is hidden": lambda path: add_file(path, "model/.x/zarr.json"),
    "a name is long": lambda path: add_file(path, f"model/{'x' * 300}/zarr.json"),
    "a name is of another group": lambda path: add_file(path, "code/x/zarr.json"),
    "a chunk index climbs": lambda path: add_file(path, "model/a.weight/c/.."),
    "a size is negative": lambda path: edit_commit(
        path, lambda commit: commit["files"][CHUNK].update(size=-1)
    ),
    "a listed file is missing": lambda path: add_file(path, "model/a.weight/c/9/9"),
    "a listed directory is missing": lambda path: shutil.rmtree(path / "model/a.bias"),
    "a chunk is missing": lambda path: (path / CHUNK).unlink(),
    "a chunk is cut": lambda path: os.truncate(path / CHUNK, 20),
    "a chunk is empty": lambda path: os.truncate(path / CHUNK, 0),
    "a chunk is longer": lambda path: os.truncate(path / CHUNK, 60),
    "a chunk's checksum is wrong": lambda path: flip_byte(path, CHUNK, -1),
    "a chunk is another's": swap_chunks,
    "a chunk is a directory": lambda path: ((path / CHUNK).unlink(), (path / CHUNK).mkdir()),
    "a chunk is a link": link_file,
    "a directory is a link": link_directory,
    "the checkpoint is a link": link_checkpoint,
    "a document is a pipe": make_fifo,
    "a document was changed": lambda path: (path / "state.json").write_text("[]"),
    "metadata was changed": lambda path: flip_byte(path, "model/a.weight/zarr.json", 30),
    "metadata cannot be read": lambda path: (
        (path / "model/a.weight/zarr.json").chmod(0)
        if os.geteuid()
        else (path / "model/a.weight/zarr.json").unlink()
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_damaged_does_not_open(damage, checkpoint):
    damage(checkpoint)
    with pytest.raises(CheckpointError):
        Checkpoint(checkpoint)


INSIDE = {
    "a value was flipped": lambda path: flip_byte(path, CHUNK, 3),
    "the shape is huge": lambda path: edit_metadata(path, shape=[2**61, 3]),
    "the shape has huge chunks": lambda path: edit_metadata(
        path,
        shape=[2**40, 3],
        chunk_grid={"name": "regular", "configuration": {"chunk_shape": [2**40, 3]}},
    ),
    "the shape has another number of dims": lambda path: edit_metadata(path, shape=[12]),
    "a chunk is in another place": lambda path: edit_metadata(
        path,
        shape=[1, 12],
        chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1]}},
    ),
    "the dtype is wider": lambda path: edit_metadata(path, data_type="float64"),
    "a codec runs something": lambda path: edit_metadata(path, codecs=[{"name": "exec"}]),
    "metadata is a list": lambda path: rewrite(path, "model/a.weight/zarr.json", b"[]"),
    "metadata is no JSON": lambda path: rewrite(path, "model/a.weight/zarr.json", b"\x80pickle"),
    "metadata is not listed": lambda path: edit_commit(
        path, lambda commit: commit["files"].pop("model/a.weight/zarr.json")
    ),
    "a chunk is not listed": lambda path: edit_commit(
        path, lambda commit: commit["files"].pop(CHUNK)
    ),
}


@pytest.mark.parametrize("damage", INSIDE.values(), ids=INSIDE.keys())
def test_what_is_damaged_inside_is_not_read(damage, checkpoint):
    damage(checkpoint)
    with pytest.raises(CheckpointError):
        list(iterate_tensors(checkpoint))


def test_the_undamaged_original_is_read(checkpoint):
    assert {name: tuple(each.shape) for name, each in iterate_tensors(checkpoint)} == {
        "a.bias": (3,),
        "a.weight": (4, 3),
    }


def test_verify_finds_a_flipped_value_without_reading_arrays(checkpoint):
    found = Checkpoint(checkpoint)
    found.verify()
    flip_byte(checkpoint, CHUNK, 3)
    with pytest.raises(CheckpointError, match="do not match their checksum"):
        found.verify()


def test_leftovers_of_a_killed_writer_do_no_harm(checkpoint):
    (checkpoint / f"{CHUNK}.__lock").write_bytes(b"half")
    (checkpoint / "COMMIT.partial").write_bytes(b"{")
    assert len(list(iterate_tensors(checkpoint))) == 2


@pytest.mark.parametrize("name", ["global_step05", "global_step-1", "global_step5.old", "step5"])
def test_directories_of_other_names_are_no_checkpoints(name, checkpoint):
    checkpoint.rename(checkpoint.parent / name)
    assert newest_valid(checkpoint.parent) is None


@pytest.mark.parametrize(
    "name", ["", "..", ".a", "a/b", "a\\b", "a b", "ä", "zarr.json", "x" * 201]
)
def test_names_that_are_no_file_names_are_refused_at_saving(name):
    with pytest.raises(CheckpointError, match="cannot be called"):
        check_array_name(name)

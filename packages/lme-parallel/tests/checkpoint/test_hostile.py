"""Damaged and hostile checkpoints end in one typed error, and never touch what is outside."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from google_crc32c import value as crc32c
from torch import distributed

from lme_parallel.args import DistributedArgs
from lme_parallel.checkpoint.args import LoadArgs, SaveArgs
from lme_parallel.checkpoint.checkpointer import Checkpointer
from lme_parallel.checkpoint.errors import CheckpointError
from lme_parallel.checkpoint.layout import check_array_name
from lme_parallel.checkpoint.reader import Checkpoint, newest_valid
from lme_parallel.checkpoint.snapshot import Snapshot, collect_tensors
from lme_parallel.checkpoint.unshard import iterate_tensors
from lme_parallel.checkpoint.writer import write_checkpoint
from lme_parallel.shards import boxed, whole
from lme_parallel.testing import run_distributed
from lme_parallel.topology import Topology


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


@dataclass
class State:
    step: int = 0
    tokens: int = 0


def on_two_ranks(folder):
    """A run whose one tensor is cut in halves and whose other one both ranks hold."""
    rank = distributed.get_rank()
    return Checkpointer(
        SaveArgs(save_path=str(folder), save_interval=1),
        parameters={
            "a.weight": torch.nn.Parameter(torch.full((2, 3), float(rank))),
            "a.bias": torch.nn.Parameter(torch.ones(3)),
        },
        buffers={},
        optimizer=None,
        stateful={},
        documents={},
        topology=Topology.from_args(DistributedArgs(stage=3), 2, rank),
        shards={
            "a.weight": boxed((4, 3), (slice(2 * rank, 2 * rank + 2), slice(0, 3)), is_owner=True),
            "a.bias": whole((3,), is_owner=rank == 0),
        },
    )


def link_out(path, name):
    """Put a link to something of the same name outside in the place of a part."""
    target = path.parents[1] / "outside" / Path(name).name
    target.parent.mkdir()
    (path / name).rename(target)
    (path / name).symlink_to(target)


def flip_in(path, chunk):
    flip_byte(path, f"model/a.weight/c/{chunk}/0", 3)


# Where only one of the ranks reads the part that is wrong, too.
ON_RANKS = {
    **{name: damage for name, damage in DAMAGE.items() if name != "no COMMIT"},
    **INSIDE,
    "a chunk links out": lambda path: link_out(path, CHUNK),
    "an array links out": lambda path: link_out(path, "model/a.weight"),
    "a group links out": lambda path: link_out(path, "model"),
    "a document links out": lambda path: link_out(path, "state.json"),
    "COMMIT links out": lambda path: link_out(path, "COMMIT"),
    "a value of the first half was flipped": lambda path: flip_in(path, 0),
    "a value of the second half was flipped": lambda path: flip_in(path, 1),
    "state is of another step": lambda path: rewrite(path, "state.json", b'{"step": 4}'),
    "state has no counters": lambda path: rewrite(path, "state.json", b"{}"),
}


def restore_each(folder, names):
    """Restore each damaged copy on both ranks; return what is said, and what was opened outside."""
    folder, opened, said = Path(folder), [], []
    checkpointer = on_two_ranks(folder / "original")
    checkpointer.save(State(5, 50))

    def note(event, arguments):
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            path = Path(arguments[0]).absolute()
            path = path.parent.resolve() / path.name
            # Such a call fails where the last part is a link; the parts before it are followed.
            is_followed = not arguments[2] & os.O_NOFOLLOW
            opened.append(str(path.resolve() if is_followed else path))

    for number, name in enumerate(names):
        case = folder / str(number)
        if distributed.get_rank() == 0:
            copy = shutil.copytree(folder / "original" / "global_step5", case / "run/global_step5")
            ON_RANKS[name](copy)
        distributed.barrier()
        state = State()
        checkpointer = on_two_ranks(case / "run")
        if not number:
            sys.addaudithook(note)
        try:
            checkpointer.restore(state)
            said.append("restored")
        except CheckpointError as error:
            said.append(f"CheckpointError: {error}")
        assert (state.step, state.tokens) == (0, 0), (name, said[-1])
        distributed.barrier()
    mine = folder.resolve()
    return [said, [each for each in opened if each.startswith(f"{mine}/") and "outside" in each]]


def test_two_ranks_end_in_one_typed_error_and_touch_nothing_outside(fast_path):
    names = list(ON_RANKS)
    assert len(names) >= 30
    (first, opened), (second, opened_2) = run_distributed(restore_each, 2, str(fast_path), names)
    assert opened == opened_2 == []
    for name, message, other in zip(names, first, second, strict=True):
        assert message.startswith("CheckpointError: "), name
        assert other.startswith("CheckpointError: "), name
        # One error, that of who found it first; the other says whose it is.
        assert message == other or "rank" in message + other, name


def restore_where_ranks_differ(folder):
    """Restore where rank 1 cannot open what rank 0 can; return the steps, or the error."""
    folder, found = Path(folder), []
    rank = distributed.get_rank()
    checkpointer = on_two_ranks(folder / "shared")
    for step in (5, 7, 9):
        checkpointer.save(State(step))
    # Rank 1 sees the newest one damaged, then the one before it, then none, as on a bad mount.
    own = folder / f"own{rank}"
    shutil.copytree(folder / "shared", own)
    for damaged in (9, 7, 5):
        if rank == 1:
            (own / f"global_step{damaged}" / "COMMIT").write_text("{}")
        state = State()
        try:
            found.append(on_two_ranks(own).restore(state))
        except CheckpointError as error:
            found.append(str(error))
    if rank == 1:
        shutil.rmtree(own)
        own.mkdir()
    for load_args in (None, LoadArgs(load_path=str(own))):
        try:
            found.append(on_two_ranks(own).restore(State(), load_args))
        except CheckpointError as error:
            found.append(str(error))
    return found


def test_ranks_that_see_different_checkpoints_take_the_same_or_none(fast_path):
    first, second = run_distributed(restore_where_ranks_differ, 2, str(fast_path))
    assert first[:2] == second[:2] == [7, 5]
    assert first[2].startswith("rank 1: no checkpoint in ")
    assert second[2].startswith("no checkpoint in ")
    for message in (*first[3:], *second[3:]):
        assert "rank 1 sees no checkpoint" in message
        assert "directory that all processes share" in message

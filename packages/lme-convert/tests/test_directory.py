import hashlib
import json
import os
import signal
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lme_convert import shards, staging
from lme_convert.api import import_from_hf
from lme_convert.directory import ModelDirectory, write_model_directory
from lme_convert.errors import ConversionError, ModelDirectoryError

CONFIG = {"model_type": "gpt_base", "format_version": 1}


def tensors():
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(7, 5, generator=generator)
    return {
        "matrix": normal,
        "transposed": normal.T,
        "view": normal[:, 1:3],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "odd bytes": torch.tensor([True, False, True]),
        "half": normal[0].half(),
        "brain": normal.bfloat16(),
        "double": normal.double(),
        "integers": torch.arange(9).view(3, 3),
        "eight": normal.to(torch.float8_e4m3fn),
    }


def digests(path):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 10**9])
def test_what_is_written_is_read_bit_for_bit(max_shard_bytes, tmp_path):
    write_model_directory(
        tmp_path / "m", CONFIG, tensors().items(), max_shard_bytes=max_shard_bytes
    )
    with ModelDirectory(tmp_path / "m") as directory:
        assert directory.config == CONFIG
        assert set(directory.names) == set(tensors())
        for name, expected in tensors().items():
            assert directory.shape(name) == tuple(expected.shape)
            assert directory.dtype(name) == expected.dtype
            actual = directory.tensor(name)
            assert actual.dtype == expected.dtype
            assert torch.equal(actual.double(), expected.double())
    # Any other reader agrees.
    read = {k: v for f in (tmp_path / "m").glob("*.safetensors") for k, v in load_file(f).items()}
    assert read.keys() == tensors().keys()
    assert torch.equal(read["transposed"], tensors()["transposed"])


@pytest.mark.parametrize(
    "region",
    [
        (slice(2, 5),),
        (slice(0, 7), slice(1, 4)),
        (slice(None), slice(4, 5)),
        (slice(3, 3), slice(0, 2)),
        (slice(6, None), slice(None, 2)),
    ],
    ids=str,
)
def test_a_region_is_what_slicing_gives(region, tmp_path):
    write_model_directory(tmp_path / "m", CONFIG, tensors().items())
    actual = ModelDirectory(tmp_path / "m").tensor("matrix", region)
    assert torch.equal(actual, tensors()["matrix"][region])


@pytest.mark.parametrize(
    "region", [(slice(0, 8),), (slice(-1, 2),), (slice(0, 4, 2),), (slice(0, 1),) * 3], ids=str
)
def test_a_region_that_leaves_the_tensor_is_refused(region, tmp_path):
    write_model_directory(tmp_path / "m", CONFIG, tensors().items())
    with pytest.raises(ValueError, match="of `matrix`"):
        ModelDirectory(tmp_path / "m").tensor("matrix", region)


def test_shards_hold_at_most_what_was_asked_and_are_indexed(tmp_path):
    items = [(f"t{number}", torch.full((10,), number)) for number in range(7)]
    write_model_directory(tmp_path / "m", CONFIG, items, max_shard_bytes=200)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 80
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    for file in files:
        stored = load_file(tmp_path / "m" / file)
        assert sum(tensor.nbytes for tensor in stored.values()) <= 200
        assert {name for name, each in index["weight_map"].items() if each == file} == set(stored)


def test_bytes_depend_on_the_tensors_alone(tmp_path, monkeypatch):
    for name in ("one", "two"):
        write_model_directory(tmp_path / name, CONFIG, tensors().items(), max_shard_bytes=300)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    # Nor on whether a shard is kept in memory until it is complete: only the header is longer.
    monkeypatch.setattr(shards, "_BUFFER_BYTES", 64)
    write_model_directory(tmp_path / "direct", CONFIG, tensors().items(), max_shard_bytes=300)
    for file in (tmp_path / "one").glob("*.safetensors"):
        one, direct = load_file(file), load_file(tmp_path / "direct" / file.name)
        assert one.keys() == direct.keys()
        assert all(torch.equal(one[k].double(), direct[k].double()) for k in one)
        length = int.from_bytes((tmp_path / "direct" / file.name).read_bytes()[:8], "little")
        assert length % 8 == 0


def test_a_header_that_outgrows_its_reserve_starts_a_new_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_BUFFER_BYTES", 0)
    monkeypatch.setattr(shards, "_RESERVED_HEADER_BYTES", 1024)
    items = {f"tensor.{number}": torch.full((3,), number) for number in range(40)}
    write_model_directory(tmp_path / "m", CONFIG, items.items())
    directory = ModelDirectory(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    assert all(torch.equal(directory.tensor(name), tensor) for name, tensor in items.items())


@pytest.mark.parametrize(
    ("items", "error", "match"),
    [
        ([], ConversionError, "no tensor to write"),
        ([("a", torch.ones(1)), ("a", torch.ones(1))], ConversionError, "`a` was given twice"),
        ([("a", torch.ones(1, dtype=torch.complex128))], ConversionError, "complex128"),
        ([("a", torch.ones(1)), None], TypeError, "None"),
    ],
    ids=["nothing", "twice", "dtype", "iterator fails"],
)
def test_a_failed_write_leaves_nothing(items, error, match, tmp_path):
    with pytest.raises(error, match=match):
        write_model_directory(tmp_path / "m", CONFIG, items)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    def full(self, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards._Shard, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        write_model_directory(tmp_path / "m", CONFIG, tensors().items())
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "m").mkdir()
    write_model_directory(tmp_path / "m", CONFIG, tensors().items())
    before = digests(tmp_path / "m")
    with pytest.raises(ModelDirectoryError, match="already exists and is not empty"):
        write_model_directory(tmp_path / "m", CONFIG, [("a", torch.ones(1))])
    assert digests(tmp_path / "m") == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelDirectoryError, match="already exists"):
        write_model_directory(tmp_path / "file", CONFIG, [("a", torch.ones(1))])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_config_without_type_or_version_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="`format_version` is missing"):
        write_model_directory(tmp_path / "m", {"model_type": "gpt_base"}, tensors().items())


def test_tokenizer_files_travel_and_nothing_else_does(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs")
    (source / "tokenizer.json").write_text('{"a": 1}')
    (source / "tokenizer.model").write_bytes(b"\0\1")
    (source / "modeling_custom.py").write_text("raise SystemExit")
    import_from_hf(source, tmp_path / "ours")
    assert (tmp_path / "ours" / "tokenizer.json").read_text() == '{"a": 1}'
    assert (tmp_path / "ours" / "tokenizer.model").read_bytes() == b"\0\1"
    assert {file.name for file in (tmp_path / "ours").iterdir()} == {
        "config.json",
        "conversion.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    }
    names = [file.name for file in ModelDirectory(tmp_path / "ours").tokenizer_files()]
    assert names == ["generation_config.json", "tokenizer.json", "tokenizer.model"]


# Steps around writes; each raises an audit event before it happens.
_STEPS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.copyfile")


def convert_and_die(source: Path, destination: Path, step: int) -> int:
    """Import in a child process that kills itself before its `step`-th step; its exit status."""
    child = os.fork()
    if child == 0:
        count = 0

        def die(event: str, args: tuple) -> None:
            nonlocal count
            reads = event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)
            if event in _STEPS and not reads:
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        def dying(function, event="open"):
            def wrapped(*args):
                die(event, (None, None, os.O_WRONLY))
                return function(*args)

            return wrapped

        try:
            import sys

            # Neither of these two raises events of its own.
            shards._Shard._write = dying(shards._Shard._write)
            os.fsync = dying(os.fsync)
            sys.addaudithook(die)
            import_from_hf(source, destination, max_shard_bytes=25_000)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which this system lacks")
def test_a_kill_at_any_step_leaves_all_or_nothing(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs", num_hidden_layers=1)
    (source / "tokenizer.json").write_text("{}")
    destination = tmp_path / "out" / "ours"
    import_from_hf(source, tmp_path / "straight", max_shard_bytes=25_000)
    expected = digests(tmp_path / "straight")
    del expected["conversion.json"]
    killed, complete = 0, 0
    for step in range(1, 1000):
        status = convert_and_die(source, destination, step)
        if destination.exists():
            found = digests(destination)
            # It holds the date.
            del found["conversion.json"]
            assert found == expected, step
            complete += 1
            for file in destination.iterdir():
                file.unlink()
            destination.rmdir()
        if status == 0:
            break
        assert os.WIFSIGNALED(status), step
        killed += 1
    # Steps before and after the rename, and one run that came to its end.
    assert killed >= 30
    assert complete >= 2
    assert os.WIFEXITED(status)
    # What killed runs left behind is gone with the next one.
    assert list((tmp_path / "out").iterdir()) == []


def test_a_running_neighbour_is_left_alone(tmp_path):
    """A partial directory whose process lives is somebody's work; a dead one's is removed."""
    prefix = staging._prefix(tmp_path / "m")
    living, foreign = tmp_path / f"{prefix}{os.getppid()}", tmp_path / ".m.partial-elsewhere-1"
    dead = tmp_path / f"{prefix}{2**22 + 1}"
    for path in (living, foreign, dead):
        path.mkdir()
    write_model_directory(tmp_path / "m", CONFIG, tensors().items())
    assert living.exists()
    assert foreign.exists()
    assert not dead.exists()


def test_the_directory_has_ordinary_permissions(tmp_path):
    write_model_directory(tmp_path / "m", CONFIG, tensors().items())
    (tmp_path / "plain").mkdir()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("m", "plain")]
    assert modes[0] == modes[1]

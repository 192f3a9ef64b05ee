"""Directories made to harm: each ends in one typed error, quickly, and nothing outside is read."""

import json
import os
import sys

import pytest
import torch

from lme_convert.api import import_from_hf, open_model
from lme_convert.directory import ModelDirectory, write_model_directory
from lme_convert.errors import ModelDirectoryError

CONFIG = {"model_type": "gpt_base", "format_version": 1}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def raw_safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def config_is(text):
    return lambda path: (path / "config.json").write_bytes(text)


def weights_are(content):
    return lambda path: (path / SINGLE).write_bytes(content)


def index_is(value):
    def make(path):
        (path / SINGLE).rename(path / "model-00001-of-00001.safetensors")
        text = value if isinstance(value, str) else json.dumps(value)
        (path / INDEX).write_text(text)

    return make


def shard_at(name):
    return index_is({"weight_map": {"a": name, "b": name}})


def linked(name):
    def make(path):
        outside = path.parent / f"outside-{name}"
        (path / name).rename(outside)
        (path / name).symlink_to(outside)

    return make


def linked_shard(path):
    shard_at("model-00001-of-00001.safetensors")(path)
    linked("model-00001-of-00001.safetensors")(path)


def pipe(name):
    def make(path):
        (path / name).unlink()
        os.mkfifo(path / name)

    return make


def directory_for(name):
    def make(path):
        (path / name).unlink()
        (path / name).mkdir()

    return make


def huge_config(path):
    with (path / "config.json").open("wb") as file:
        file.truncate(10 * 1024**3)


def truncated(path):
    content = (path / SINGLE).read_bytes()
    (path / SINGLE).write_bytes(content[:-3])


def pickled(path):
    (path / SINGLE).unlink()
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


def training_checkpoint(path):
    (path / SINGLE).unlink()
    (path / "COMMIT").write_text("{}")


HOSTILE = {
    "config is not JSON": config_is(b"{"),
    "config is a list": config_is(b"[]"),
    "config is not text": config_is(b"\xff\xfe\x00"),
    "config is a depth bomb": config_is(b"[" * 200_000),
    "config names a key twice": config_is(b'{"model_type": "gpt_base", "model_type": "llama"}'),
    "config is 10 GiB of nothing": huge_config,
    "config is a pipe": pipe("config.json"),
    "config is a directory": directory_for("config.json"),
    "config is a link outside": linked("config.json"),
    "model_type is missing": config_is(b'{"format_version": 1}'),
    "model_type is a mapping": config_is(b'{"model_type": {}, "format_version": 1}'),
    "format_version is missing": config_is(b'{"model_type": "gpt_base"}'),
    "format_version is of the future": config_is(b'{"model_type": "palm", "format_version": 2}'),
    "format_version is true": config_is(b'{"model_type": "palm", "format_version": true}'),
    "weights are empty": weights_are(b""),
    "weights are truncated": truncated,
    "weights are a pipe": pipe(SINGLE),
    "weights are a link outside": linked(SINGLE),
    "header longer than the file": weights_are((10**12).to_bytes(8, "little") + b"{}"),
    "header is not JSON": weights_are(raw_safetensors(b"{")),
    "header is a depth bomb": weights_are(raw_safetensors(b'{"a":' * 100_000)),
    "offsets overlap": weights_are(
        raw_safetensors({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6))
    ),
    "offsets leave a hole": weights_are(
        raw_safetensors({"a": entry(), "b": entry(offsets=(8, 12))}, bytes(12))
    ),
    "offsets are negative": weights_are(raw_safetensors({"a": entry(offsets=(-4, 0))}, bytes(4))),
    "offsets end after the file": weights_are(
        raw_safetensors({"a": entry(shape=(9,), offsets=(0, 36))}, bytes(4))
    ),
    "shape does not match the offsets": weights_are(
        raw_safetensors({"a": entry(shape=(2**40, 2**40))}, bytes(4))
    ),
    "dtype is unknown": weights_are(raw_safetensors({"a": entry(dtype="PICKLE")}, bytes(4))),
    "weights are pickled": pickled,
    "training checkpoint": training_checkpoint,
    "single file and index": lambda path: (path / INDEX).write_text("{}"),
    "index is not JSON": index_is("}"),
    "index has no map": index_is({}),
    "map is a list": index_is({"weight_map": ["a"]}),
    "map names a number": index_is({"weight_map": {"a": 1}}),
    "shard climbs out": shard_at("../outside.safetensors"),
    "shard climbs out and back": shard_at("sub/../../x/model.safetensors"),
    "shard is absolute": shard_at("/etc/passwd.safetensors"),
    "shard climbs out the other way": shard_at("..\\outside.safetensors"),
    "shard has a zero byte": shard_at("model\0.safetensors"),
    "shard is no safetensors": shard_at("/etc/passwd"),
    "shard is missing": shard_at("model-00002-of-00002.safetensors"),
    "shard is a link outside": linked_shard,
    "shard lacks a tensor": index_is(
        {"weight_map": dict.fromkeys("abc", "model-00001-of-00001.safetensors")}
    ),
    "shard has a tensor more": index_is({"weight_map": {"a": "model-00001-of-00001.safetensors"}}),
}


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "model"
    tensors = [("a", torch.ones(3)), ("b", torch.ones(2, 2))]
    write_model_directory(path, CONFIG, tensors)
    # What links and climbing names aim at: harmless weights, were they read.
    (tmp_path / "outside.safetensors").write_bytes((path / SINGLE).read_bytes())
    return path


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_directory_ends_in_one_typed_error(kind, victim):
    HOSTILE[kind](victim)
    with pytest.raises(ModelDirectoryError) as caught:
        dict(open_model(victim))
    assert len(str(caught.value)) < 2000


def test_an_unharmed_directory_opens(victim):
    assert set(open_model(victim)) == {"a", "b"}


def test_a_dtype_that_torch_lacks_is_named(victim):
    weights_are(raw_safetensors({"a": entry(dtype="F8_E8M0", shape=(4,))}, bytes(4)))(victim)
    with pytest.raises(ModelDirectoryError, match=r"tensor `a`.* has dtype F8_E8M0"):
        open_model(victim)["a"]


def test_a_link_outside_is_not_copied_as_tokenizer(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (source / "tokenizer.json").symlink_to(secret)
    with pytest.raises(ModelDirectoryError, match=r"tokenizer.json` is a link"):
        import_from_hf(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_links_of_the_hub_cache_are_followed_and_no_others(victim, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("config.json", SINGLE)):
        (blobs / str(number)).write_bytes((victim / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    with ModelDirectory(snapshot) as directory:
        assert directory.names == ("a", "b")
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(victim / SINGLE)
    with pytest.raises(ModelDirectoryError, match="is a link"):
        ModelDirectory(snapshot)


_EVENTS: list[str] = []


def _watch(event, args):
    if event.startswith(("pickle.", "subprocess.", "os.system", "exec", "compile", "marshal.")):
        _EVENTS.append(event)


def test_reading_a_model_runs_no_code_from_it(victim, tmp_path):
    """Nothing is unpickled, compiled, executed or started while tensors are read."""
    open_model(victim)["a"]
    sys.addaudithook(_watch)
    _EVENTS.clear()
    for _ in open_model(victim).values():
        pass
    assert _EVENTS == []
    # The hook does see such things.
    compile("1", "<test>", "eval")
    assert _EVENTS == ["compile"]

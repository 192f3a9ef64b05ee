import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lme_parallel.checkpoint import arrays
from lme_parallel.checkpoint.arrays import (
    ArrayLayout,
    SavedTensor,
    chunk_shape,
    create_arrays,
    read_arrays,
    write_arrays,
)
from lme_parallel.checkpoint.errors import CheckpointError

TENSORS = {
    "fp32": torch.randn(7, 5),
    "fp64": torch.randn(3, dtype=torch.float64),
    "fp16": torch.randn(4, 2).half(),
    # Bit patterns that arithmetic would not keep.
    "bf16": torch.arange(-(2**15), 2**15, 2**8).to(torch.int16).view(torch.bfloat16),
    "fp8": torch.arange(128).to(torch.uint8).view(torch.float8_e4m3fn),
    "int64": torch.tensor([2**63 - 1, -(2**63)]),
    "int8": torch.tensor([[-128], [127]], dtype=torch.int8),
    "bool": torch.tensor([True, False]),
    "complex": torch.randn(2, dtype=torch.complex64),
    "scalar": torch.tensor(3.5),
    "bf16_scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "int_scalar": torch.tensor(7),
    "empty": torch.empty(0, 4),
    "zeros": torch.zeros(3, 3),
    "strided": torch.randn(6, 4).t(),
    "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def save(folder, tensors):
    (folder / "model").mkdir()
    saved = [SavedTensor(f"model/{n}", ArrayLayout.of(t), t) for n, t in tensors.items()]
    layouts = {each.path: each.layout for each in saved}
    files = create_arrays(folder, layouts, lambda name: None)
    written = write_arrays(folder, saved, lambda name: None)
    assert set(written) == {name for name in files if not name.endswith("zarr.json")}
    return layouts, files


@pytest.mark.parametrize("chunk_bytes", [2**26, 16], ids=["one chunk", "many chunks"])
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(arrays, "MAX_CHUNK_BYTES", chunk_bytes)
    layouts, files = save(tmp_path, TENSORS)
    assert sorted(files) == sorted(
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    )
    for name, tensor in TENSORS.items():
        found = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        read_arrays(tmp_path, [(f"model/{name}", layouts[f"model/{name}"], None, found)])
        assert torch.equal(bits(found), bits(tensor)), name


def test_chunks_of_zeros_are_written_too(tmp_path):
    # Else a lost chunk could not be told from one of zeros.
    _, files = save(tmp_path, {"zeros": torch.zeros(3, 3)})
    assert "model/zeros/c/0/0" in files
    assert (tmp_path / "model/zeros/c/0/0").stat().st_size == 9 * 4 + 4


def test_zarr_python_reads_the_arrays(tmp_path):
    zarr = pytest.importorskip("zarr", reason="zarr-python is needed for tests only")
    readable = {"fp32", "fp64", "fp16", "int64", "int8", "bool", "complex", "scalar", "zeros"}
    readable |= {"int_scalar", "empty", "strided", "nan"}
    save(tmp_path, {name: TENSORS[name] for name in readable})
    for name in readable:
        found = zarr.open_array(tmp_path / "model" / name, mode="r")[...]
        np.testing.assert_array_equal(found, TENSORS[name].numpy())


@given(st.data())
def test_any_region_is_that_part_of_the_array(data):
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    region = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        region.append(slice(start, data.draw(st.integers(start + 1, size))))
    region = tuple(region)
    chunks = tuple(data.draw(st.integers(1, size)) for size in shape)
    tensor = torch.randn(shape)
    layout = ArrayLayout(tuple(shape), torch.float32, chunks)
    with pytest.MonkeyPatch.context() as patch:
        stores = {}
        patch.setattr(arrays, "_open", lambda path, layout, mode: stores[path.name])
        stores["a"] = arrays.tensorstore.array(tensor.numpy())
        found = torch.full([each.stop - each.start for each in region], float("nan"))
        read_arrays(arrays.Path("root"), [("model/a", layout, region, found)])
    assert torch.equal(found, tensor[region])


def test_a_region_spanning_chunks_is_read_from_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "MAX_CHUNK_BYTES", 16)
    tensor = torch.arange(30).view(10, 3).float()
    layouts, files = save(tmp_path, {"a": tensor})
    assert len(files) > 5
    found = torch.empty(5, 2)
    region = (slice(3, 8), slice(1, 3))
    read_arrays(tmp_path, [("model/a", layouts["model/a"], region, found)])
    assert torch.equal(found, tensor[region])


def test_a_target_of_another_dtype_is_converted(tmp_path):
    tensor = torch.randn(8)
    layouts, _ = save(tmp_path, {"a": tensor})
    found = torch.empty(8, dtype=torch.bfloat16)
    read_arrays(tmp_path, [("model/a", layouts["model/a"], None, found)])
    assert torch.equal(found, tensor.bfloat16())


@given(
    st.lists(st.integers(0, 10**7), max_size=4),
    st.sampled_from([1, 2, 4, 8, 16]),
)
def test_no_chunk_passes_64_mib_and_little_is_padded(shape, itemsize):
    chunks = chunk_shape(shape, itemsize)
    assert all(chunk >= 1 for chunk in chunks)
    assert np.prod([float(chunk) for chunk in chunks]) * itemsize <= 2**26
    for size, chunk in zip(shape, chunks, strict=True):
        # Even parts: a dim's last chunk lacks less than one row per chunk.
        count = -(-size // chunk)
        assert count * chunk - size < max(1, count) or size == 0


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [-1]},
        {"shape": [True]},
        {"shape": [2**70]},
        {"shape": "7"},
        {"data_type": "object"},
        {"data_type": ["float32"]},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0]}}},
        {"chunk_grid": None},
        {"codecs": [{"name": "gzip"}]},
        {"fill_value": 1.0},
        {"node_type": "group"},
        {"zarr_format": 2},
        {"storage_transformers": [{"name": "exec"}]},
    ],
    ids=str,
)
def test_foreign_metadata_is_refused(change):
    metadata = ArrayLayout((4,), torch.float32, (4,)).metadata()
    with pytest.raises(CheckpointError, match="here"):
        ArrayLayout.from_metadata(json.loads(json.dumps({**metadata, **change})), "here")


def test_a_dtype_that_cannot_be_stored_is_refused():
    with pytest.raises(CheckpointError, match="e4m3fnuz"):
        ArrayLayout.of(torch.empty(1, dtype=torch.float8_e4m3fnuz))

import json

import pytest
import torch

from lme_kernels import tuning
from lme_kernels.functional import rmsnorm
from lme_kernels.ops.rmsnorm import RMSNORM
from lme_kernels.testing import check_against_reference, fused_backends
from lme_kernels.tuning import (
    RowSettings,
    bucket,
    row_candidates,
    row_settings,
    search,
    stored_settings,
    using,
)

# Settings of another version.
FOREIGN = '{"rmsnorm.forward": {"8x64x2": {"block": 64}}}'


def candidates_of_one_shape():
    """Some of them; none where Triton has neither a GPU nor its interpreter."""
    backends = fused_backends(RMSNORM)
    return row_candidates("rmsnorm.backward", 9, 64, 4)[::7] if backends else []


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LME_KERNELS_TUNE", raising=False)

    def forget():
        tuning._stored.cache_clear()
        row_settings.cache_clear()

    forget()
    yield tuning.cache_path(), forget
    forget()


@pytest.mark.parametrize("rows", [1, 3, 1000, 1 << 20])
@pytest.mark.parametrize("columns", [1, 64, 768, 4096, 5000, 32768])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_rules_cover_a_row_within_what_a_gpu_launches(cache, rows, columns, direction):
    settings = row_settings(f"rmsnorm.{direction}", rows, columns, 2, 132)
    assert settings.block_columns >= columns > settings.block_columns // 2
    assert settings.block_rows & (settings.block_rows - 1) == 0
    assert 1 <= settings.num_warps <= 32
    assert 1 <= settings.programs <= rows
    # A program holds no more numbers than its threads have registers for.
    assert settings.block_rows * settings.block_columns <= 1024 * max(4, settings.num_warps)


def test_a_search_keeps_the_fastest_and_later_processes_use_it(cache):
    path, forget = cache
    fast, slow, broken = (RowSettings(1, 4096, warps, 264) for warps in (16, 4, 64))
    seconds = {fast: 1.0, slow: 2.0}

    def measure(candidate):
        if candidate is broken:
            raise RuntimeError("too many warps")
        return seconds[candidate]

    key = bucket(16000, 4096, 2)
    assert search("rmsnorm.forward", key, [slow, broken, fast], measure) == fast
    forget()
    assert row_settings("rmsnorm.forward", 16384, 4096, 2, 132) == fast
    # Another shape and another kernel are untouched, and so is a second entry of the file.
    assert row_settings("rmsnorm.forward", 16384, 4095, 2, 132) != fast
    search("rmsnorm.backward", key, [slow], measure)
    assert set(json.loads(path.read_text())) == {"rmsnorm.forward", "rmsnorm.backward"}


def test_tuning_can_be_switched_off(cache, monkeypatch):
    _, forget = cache
    tuning.store("rmsnorm.forward", bucket(8, 64, 2), RowSettings(1, 64, 1, 1))
    forget()
    assert stored_settings("rmsnorm.forward", bucket(8, 64, 2)) is not None
    monkeypatch.setenv("LME_KERNELS_TUNE", "off")
    assert stored_settings("rmsnorm.forward", bucket(8, 64, 2)) is None


def test_a_launch_uses_the_settings_that_are_fixed_for_it():
    _triton_rows = pytest.importorskip("lme_kernels._triton_rows")
    x, fixed = torch.randn(8, 64), RowSettings(2, 64, 1, 3)
    rule = _triton_rows.settings_of("rmsnorm.backward", x, 8)
    with using("rmsnorm.backward", fixed):
        assert _triton_rows.settings_of("rmsnorm.backward", x, 8) is fixed
        assert _triton_rows.settings_of("rmsnorm.forward", x, 8) != fixed
    assert _triton_rows.settings_of("rmsnorm.backward", x, 8) == rule != fixed


@pytest.mark.parametrize("op", ["rmsnorm.forward", "rmsnorm.backward"])
@pytest.mark.parametrize("columns", [64, 768, 4096, 32768])
def test_candidates_surround_the_rule(cache, op, columns):
    candidates = row_candidates(op, 16384, columns, 132)
    rule = row_settings(op, 16384, columns, 2, 132)
    assert len(set(candidates)) == len(candidates) >= 3
    assert (rule.block_rows, rule.num_warps) in {(c.block_rows, c.num_warps) for c in candidates}


@pytest.mark.parametrize("settings", candidates_of_one_shape(), ids=str)
def test_any_candidate_gives_the_same_numbers(settings):
    x, weight = torch.randn(9, 64), torch.randn(64)
    with using("rmsnorm.backward", settings):
        check_against_reference(rmsnorm, (x, weight), backend="triton", dtype=torch.float32)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"rmsnorm.forward": ', FOREIGN])
def test_a_damaged_file_is_as_good_as_none(cache, content):
    path, forget = cache
    path.parent.mkdir(parents=True)
    path.write_text(content)
    forget()
    assert stored_settings("rmsnorm.forward", bucket(8, 64, 2)) is None
    row_settings("rmsnorm.forward", 8, 64, 2, 132)


def test_a_search_without_a_candidate_that_runs_is_an_error(cache):
    with pytest.raises(ValueError, match="none of the candidates for"):
        search("rmsnorm.forward", "1x1x2", [], lambda candidate: 1.0)

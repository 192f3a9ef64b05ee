"""The `tpu` extra pins its torch without touching anybody else's."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def exported_torch(*arguments):
    """The torch versions in `uv export`, read from the lock that the install wrote."""
    if not (ROOT / "uv.lock").exists():
        pytest.skip("needs uv.lock, which `uv sync` or `uv run` writes; found none")
    command = ["uv", "export", "--frozen", "--no-hashes", "--no-dev", "--quiet", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    return re.findall(r"^torch==([\d.]+)", result.stdout, re.M)


@pytest.mark.parametrize("package", [None, "lme-cli", "lme-parallel"])
def test_default_and_cuda_get_a_new_torch_and_tpu_gets_its_own(package):
    scope = ["--package", package] if package else []
    for extra in ([], ["--extra", "cuda"]):
        (version,) = exported_torch(*scope, *extra)
        major, minor = map(int, version.split(".")[:2])
        assert (major, minor) >= (2, 10), f"{package} {extra}: torch {version}"
    (version,) = exported_torch(*scope, "--extra", "tpu")
    assert version.startswith("2.9.")


@pytest.mark.parametrize("package", ["lme-kernels", "lme-core", "lme-data", "lme-convert"])
def test_packages_without_the_extra_are_left_alone(package):
    (version,) = exported_torch("--package", package)
    assert not version.startswith("2.9.")

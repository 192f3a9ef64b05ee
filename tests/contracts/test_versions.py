"""Versions, changelogs and sibling ranges agree: uv itself does not check the ranges."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = {
    file.parent.name: tomllib.loads(file.read_text())["project"]
    for file in sorted(ROOT.glob("packages/*/pyproject.toml"))
}


def requirements(project):
    extras = project.get("optional-dependencies", {})
    return [
        Requirement(each) for group in (project["dependencies"], *extras.values()) for each in group
    ]


def test_there_are_six_packages():
    names = {"lme-cli", "lme-convert", "lme-core", "lme-data", "lme-kernels", "lme-parallel"}
    assert set(PROJECTS) == names


@pytest.mark.parametrize("name", PROJECTS)
def test_each_sibling_range_admits_the_siblings_version(name):
    for requirement in requirements(PROJECTS[name]):
        if requirement.name in PROJECTS:
            version = PROJECTS[requirement.name]["version"]
            assert requirement.specifier.contains(version), (
                f"{name}: {requirement} against {version}"
            )
            assert requirement.specifier, f"{name}: {requirement} has no range"


@pytest.mark.parametrize("name", PROJECTS)
def test_the_module_the_project_and_the_changelog_name_one_version(name):
    folder = ROOT / "packages" / name
    version = PROJECTS[name]["version"]
    init = (folder / "src" / name.replace("-", "_") / "__init__.py").read_text()
    assert f'__version__ = "{version}"' in init
    heading = re.search(r"^## (.+)$", (folder / "CHANGELOG.md").read_text(), re.M)
    assert heading is not None
    assert heading[1].startswith(("Unreleased", version))


@pytest.mark.parametrize("name", PROJECTS)
def test_each_package_ships_what_a_published_package_needs(name):
    folder = ROOT / "packages" / name
    project = PROJECTS[name]
    for file in ("README.md", "CHANGELOG.md", "LICENSE"):
        assert (folder / file).stat().st_size > 0
    assert (folder / "src" / name.replace("-", "_") / "py.typed").exists()
    assert any(folder.joinpath("tests").rglob("test_*.py"))
    assert project["license"] == "Apache-2.0"
    assert project["requires-python"] == ">=3.11"


@pytest.mark.parametrize("name", PROJECTS)
def test_third_parties_have_lower_bounds_and_no_upper_bounds(name):
    for requirement in requirements(PROJECTS[name]):
        operators = {each.operator for each in requirement.specifier}
        if requirement.name in PROJECTS or operators == {"=="}:
            continue
        assert operators == {">="}, f"{name}: {requirement}"

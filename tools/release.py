"""Prepare a release of one package: version, changelog heading, tag.

`python tools/release.py lme-convert minor` says what it will do and asks before doing it;
nothing is pushed or published.
"""

import argparse
import datetime
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def bumped(version: str, part: str) -> str:
    """The next version: `part` is major, minor or patch."""
    numbers = [int(each) for each in version.split(".")]
    place = ("major", "minor", "patch").index(part)
    return ".".join(map(str, [*numbers[:place], numbers[place] + 1, *[0] * (2 - place)]))


def main() -> None:
    """Bump, date the changelog, commit and tag."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package")
    parser.add_argument("part", choices=["major", "minor", "patch"])
    parser.add_argument("--yes", action="store_true", help="do not ask")
    options = parser.parse_args()
    folder = ROOT / "packages" / options.package
    project = folder / "pyproject.toml"
    if not project.exists():
        sys.exit(f"no package `{options.package}` under packages/")
    old = tomllib.loads(project.read_text())["project"]["version"]
    new = bumped(old, options.part)
    init = folder / "src" / options.package.replace("-", "_") / "__init__.py"
    changelog = folder / "CHANGELOG.md"
    heading = f"## {new} - {datetime.date.today().isoformat()}"
    tag = f"{options.package}-v{new}"
    print(f"{options.package}: {old} -> {new}; changelog heading `{heading}`; tag {tag}")
    if not options.yes and input("continue? [y/N] ") != "y":
        return
    for file, before, after in [
        (project, f'version = "{old}"', f'version = "{new}"'),
        (init, f'__version__ = "{old}"', f'__version__ = "{new}"'),
        (changelog, "## Unreleased", f"## Unreleased\n\n{heading}"),
    ]:
        text = file.read_text()
        if before not in text:
            sys.exit(f"{file} does not contain `{before}`")
        file.write_text(text.replace(before, after, 1))
    subprocess.run(["git", "commit", "-am", f"{options.package}: release {new}"], check=True)
    subprocess.run(["git", "tag", tag], check=True)


if __name__ == "__main__":
    main()

"""Packages changed since a git revision, and those that depend on them.

`python tools/affected.py --since main` prints one package name a line.
"""

import argparse
import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def dependents() -> dict[str, set[str]]:
    """For each package, the packages of the workspace that require it, itself included."""
    requires = {}
    for file in sorted(ROOT.glob("packages/*/pyproject.toml")):
        project = tomllib.loads(file.read_text())["project"]
        names = {re.split(r"[\[<>=~! ;]", each)[0] for each in project["dependencies"]}
        requires[project["name"]] = {each for each in names if each.startswith("lme-")}
    return {
        name: {name} | {other for other, needs in requires.items() if name in needs}
        for name in requires
    }


def main() -> None:
    """Print the affected packages; a change outside `packages/` affects all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--since", default="main", help="git revision to compare with")
    since = parser.parse_args().since
    command = ["git", "diff", "--name-only", since]
    changed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    table = dependents()
    affected: set[str] = set()
    for path in changed.splitlines():
        parts = path.split("/")
        affected |= table.get(parts[1], set()) if parts[0] == "packages" else table.keys()
    print(*sorted(affected), sep="\n")


if __name__ == "__main__":
    main()

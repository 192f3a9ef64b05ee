"""Install each built wheel alone in an empty environment and import it.

`python tools/check_wheels.py dist` proves that a package stands on its own declared
requirements: siblings may only come from the same folder, and only those it declares.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

SIBLINGS = {
    "lme_kernels": set(),
    "lme_convert": set(),
    "lme_data": set(),
    "lme_parallel": set(),
    "lme_core": {"lme_kernels"},
    "lme_cli": {"lme_kernels", "lme_convert", "lme_data", "lme_parallel", "lme_core"},
}

_IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module({name!r})
optional = ("_pallas", "_nki", "_triton")
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    leaf = module.name.rsplit(".", 1)[-1]
    if not leaf.startswith(optional) and leaf != "__main__" and ".pallas" not in module.name:
        importlib.import_module(module.name)
ours = sorted(name for name in sys.modules if name.startswith("lme_") and "." not in name)
print(*ours)
"""


def run(*command: str) -> str:
    """Output of `command`; a failure ends the check with its errors."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


def check(wheel: Path, name: str) -> None:
    """Import every module of `wheel` where nothing but its requirements is installed."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "env"
        python = str(environment / "bin" / "python")
        run("uv", "venv", "--quiet", str(environment))
        # uv keeps a sibling's wheel by its name alone, so a rebuilt one of the same version is
        # taken from the last run unless it is asked to look again.
        options = ["--find-links", str(wheel.parent)]
        for sibling in SIBLINGS:
            options += ["--refresh-package", sibling.replace("_", "-")]
        run("uv", "pip", "install", "--quiet", "--python", python, *options, str(wheel))
        found = set(run(python, "-c", _IMPORT_ALL.format(name=name)).split()) - {name}
    if found - SIBLINGS[name]:
        sys.exit(f"{name} imports {sorted(found - SIBLINGS[name])}, which it must not know")
    print(f"{name}: imports alone, with {', '.join(sorted(found)) or 'nothing of ours'}")


def main() -> None:
    """Check every wheel of the folder given on the command line."""
    wheels = {re.split(r"-\d", path.name)[0]: path for path in Path(sys.argv[1]).glob("*.whl")}
    missing = SIBLINGS.keys() - wheels.keys()
    if missing:
        sys.exit(f"no wheel of {sorted(missing)} in {sys.argv[1]}")
    for name, wheel in sorted(wheels.items()):
        check(wheel, name)


if __name__ == "__main__":
    main()

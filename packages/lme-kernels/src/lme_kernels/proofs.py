"""Where and when the tests of each implementation passed on a device: what `proofs.json` records."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Proof:
    """Tests of one implementation on one kind of machine, the last time they were recorded."""

    machine: str
    """Name of the device."""
    date: str
    """Day of the run, as in 2026-11-24."""
    commit: str
    """Commit of this repository that was tested."""
    passed: int
    """Tests that passed."""
    failed: int
    """Tests that failed."""

    @property
    def holds(self) -> bool:
        """Whether tests ran and none failed."""
        return self.passed > 0 and self.failed == 0


def load_proofs() -> Mapping[str, tuple[Proof, ...]]:
    """Read what is recorded of this version of the package.

    Returns:
        By "op@backend", one entry a machine; what was never run on a device is absent.
    """
    return parse_proofs((files("lme_kernels") / "proofs.json").read_text())


def parse_proofs(text: str) -> Mapping[str, tuple[Proof, ...]]:
    """Read the file's contents.

    Args:
        text: JSON: by "op@backend", by machine, the other fields of `Proof`.

    Returns:
        By "op@backend", one entry a machine.
    """
    return {
        name: tuple(Proof(machine, **fields) for machine, fields in machines.items())
        for name, machines in json.loads(text).items()
    }

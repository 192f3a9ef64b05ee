import tempfile
from pathlib import Path

import pytest
import torch

from lme_parallel.equality import differences, make_args, run_steps
from lme_parallel.testing import run_distributed
from lme_parallel.topology import Topology


@pytest.fixture(scope="session")
def fast_root():
    """A folder in memory where the system has one.

    Nothing is lost to SIGKILL there that a disk would keep, and hundreds of syncs cost nothing.
    """
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def fast_path(fast_root):
    """A folder of this test's own in `fast_root`."""
    with tempfile.TemporaryDirectory(dir=fast_root) as folder:
        yield Path(folder)


def run_each(calls):
    """In a process of a group: the steps of several layouts, one after the other."""
    found = {}
    for name, arguments in calls.items():
        try:
            found[name] = run_steps(*arguments)
        except Exception as error:
            error.add_note(f"in the layout {name!r}")
            raise
        if arguments[0].get("torch_compile"):
            # Compilations are counted by code, which layouts share: after too many it runs as it is.
            torch._dynamo.reset()
    return found


class Comparison:
    """Compares layouts with one process: those of a table that have as many processes in one group.

    Starting processes and what they do but once cost more than the steps themselves.
    """

    def __init__(self):
        self._ranks = {}
        self._alone = {}

    def __call__(self, table, name):
        """How far a layout is from one process, as `compare_layout` says it.

        Args:
            table: By name, all layouts of a file: settings, processes, and options of
                `compare_layout`.
            name: The one to look at.
        """
        size = table[name][1]
        if (id(table), size) not in self._ranks:
            calls = {
                each: self._arguments(*layout)
                for each, layout in table.items()
                if layout[1] == size
            }
            # The table is kept, so that its id stays its own.
            ranks = run_distributed(run_each, size, calls, timeout_seconds=500)
            self._ranks[id(table), size] = (table, ranks)
        ranks = [each[name] for each in self._ranks[id(table), size][1]]
        settings, dtype, accumulation, steps, options = self._arguments(*table[name])
        replicas = Topology.from_args(make_args(settings), size, 0).data_world_size
        return differences(ranks, self._single(dtype, accumulation * replicas, steps, options))

    @staticmethod
    def _arguments(settings, size, comparison):
        defaults = {"dtype": torch.float64, "accumulation": 2, "steps": 3, "options": {}}
        assert comparison.keys() <= defaults.keys()
        chosen = {**defaults, **comparison}
        names = ("accumulation", "steps", "options")
        return (settings, str(chosen["dtype"]), *(chosen[each] for each in names))

    def _single(self, *arguments):
        key = repr(arguments)
        if key not in self._alone:
            self._alone[key] = run_steps({}, *arguments)
        return self._alone[key]


@pytest.fixture(scope="session")
def compare():
    return Comparison()

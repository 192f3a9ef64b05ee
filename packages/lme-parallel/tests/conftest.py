import tempfile
from pathlib import Path

import pytest


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

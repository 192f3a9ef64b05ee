"""What every test of the workspace shares: hardware markers and fixed seeds."""

import os
import random
import sys

import pytest
import torch

# Tests never reach a model hub; what needs one carries the marker `network`.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
# Read when triton is first imported, by whichever test comes first: without a GPU its kernels run
# in its interpreter.
if NUM_GPUS == 0:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config, items):
    """Skip what the hardware cannot run, saying what was needed and what was found."""
    needs = {"gpu": 1, "multigpu": 2}
    marked = [(item, name) for item in items for name in needs if item.get_closest_marker(name)]
    if not marked:
        return
    for item, name in marked:
        if needs[name] > NUM_GPUS:
            reason = f"needs {needs[name]} GPU(s), found {NUM_GPUS}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(0)
    torch.manual_seed(0)

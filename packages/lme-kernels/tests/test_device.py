"""What a device must have for programs that take much shared memory."""

from types import SimpleNamespace

import pytest
import torch

from lme_kernels.device import why_not_shared


class OnGPU(SimpleNamespace):
    """As much of a tensor on a GPU as is looked at."""

    is_cuda = True
    device = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("limits", "needed", "reason"),
    [
        ({"shared_memory_per_block_optin": 99 * 1024}, 80 * 1024, None),
        ({"shared_memory_per_block_optin": 99 * 1024}, 99 * 1024, None),
        (
            {"shared_memory_per_block_optin": 99 * 1024},
            108 * 1024,
            "its programs take 108 KiB of shared memory, and some GPU has 99",
        ),
        # An AMD GPU has no limit that one can opt into.
        ({}, 80 * 1024, "its programs take 80 KiB of shared memory, and some GPU has 64"),
    ],
)
def test_programs_that_do_not_fit_are_refused(monkeypatch, limits, needed, reason):
    device = SimpleNamespace(name="some GPU", shared_memory_per_block=64 * 1024, **limits)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert why_not_shared(OnGPU(), needed) == reason


def test_what_is_interpreted_fits():
    assert why_not_shared(torch.empty(1), 1 << 40) is None

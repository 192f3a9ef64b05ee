"""What a checkpoint of one moment holds, and the host buffer that an asynchronous save copies to."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lme_parallel.checkpoint.arrays import ArrayLayout, SavedTensor
from lme_parallel.checkpoint.layout import check_array_name
from lme_parallel.checkpoint.optimizer_state import tensor_state

logger = logging.getLogger(__name__)

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that goes into one checkpoint."""

    step: int
    """Optimizer steps done."""
    tensors: Sequence[SavedTensor]
    documents: Mapping[str, bytes]
    """Content of the JSON files at the top, by file name."""


def collect_tensors(
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: Optimizer | None,
) -> list[SavedTensor]:
    """Name every tensor of a checkpoint and lay it out; nothing is copied.

    Args:
        parameters: By fully qualified name.
        buffers: By fully qualified name.
        optimizer: Its state is taken too; `None` for none.

    Raises:
        CheckpointError: If a name, a dtype or a kind of state cannot be saved.
    """
    named = {f"model/{name}": each for name, each in {**parameters, **buffers}.items()}
    if optimizer is not None:
        names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        state = tensor_state(optimizer, names)
        named |= {f"optimizer/{name}": each for name, each in state.items()}
    saved = []
    for path, tensor in named.items():
        check_array_name(path.partition("/")[2])
        saved.append(SavedTensor(path, ArrayLayout.of(tensor), tensor.detach()))
    return saved


class HostBuffer:
    """One block of host memory, allocated once, that holds a copy of every tensor.

    Args:
        size: Bytes to allocate now.
        pinned: Whether devices copy into it directly.
    """

    def __init__(self, size: int, *, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = self._allocate(size)

    @property
    def size(self) -> int:
        """Bytes allocated."""
        return self._memory.numel()

    def copy(self, tensors: Sequence[SavedTensor]) -> list[SavedTensor]:
        """Copy tensors into the buffer and return the copies, once they are complete.

        The buffer grows, once, if the tensors need more than was foreseen.

        Args:
            tensors: On any devices; they may change as soon as this returns.
        """
        needed = buffer_bytes(tensors)
        if needed > self.size:
            logger.info("checkpoint buffer grew: bytes=%d was=%d", needed, self.size)
            self._memory = self._allocate(needed)
        copies, offset, devices = [], 0, set()
        for each in tensors:
            size = each.tensor.numel() * each.tensor.element_size()
            place = self._memory[offset : offset + size].view(each.tensor.dtype)
            place = place.view(each.tensor.shape)
            place.copy_(each.tensor, non_blocking=True)
            copies.append(replace(each, tensor=place))
            offset += _aligned(size)
            devices.add(each.tensor.device)
        for device in devices:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        return copies

    def _allocate(self, size: int) -> Tensor:
        # Touched now: the first save should not wait for the system to find the pages.
        return torch.zeros(size, dtype=torch.uint8, pin_memory=self._pinned)


def buffer_bytes(tensors: Sequence[SavedTensor]) -> int:
    """Return the bytes that a buffer needs for `tensors`."""
    return sum(_aligned(each.tensor.numel() * each.tensor.element_size()) for each in tensors)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT

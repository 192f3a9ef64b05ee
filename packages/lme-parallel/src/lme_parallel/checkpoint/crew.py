"""The processes that save and load a checkpoint together, and how they agree."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from lme_parallel.checkpoint.documents import Json
from lme_parallel.checkpoint.errors import CheckpointError, CheckpointMismatchError


class Crew:
    """All processes of a run; one process alone needs no group.

    Args:
        group: Over gloo, used by nobody else: messages of a save in the background must not meet
            those of training. `None`: one process.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else distributed.get_rank(group)
        self.size = 1 if group is None else distributed.get_world_size(group)

    @classmethod
    def of(cls, world_size: int) -> "Crew":
        """Gather the processes of a run; all call this at the same time.

        Args:
            world_size: How many there are.
        """
        if world_size == 1:
            return cls()
        group = distributed.new_group(backend="gloo")
        if not isinstance(group, ProcessGroup):
            raise RuntimeError("this process is not part of the group of all processes")
        return cls(group)

    @property
    def is_first(self) -> bool:
        """Whether this process does what only one may."""
        return self.rank == 0

    def gather(self, value: Json) -> list[Json]:
        """Return what each process gave, by rank.

        Args:
            value: JSON.

        Raises:
            CheckpointError: If a process is gone.
        """
        if self._group is None:
            return [value]
        try:
            return self._gather(value, self._group)
        except RuntimeError as error:
            raise CheckpointError(
                f"a process of the run is gone, or does not answer: {error}"
            ) from error

    def _gather(self, value: Json, group: ProcessGroup) -> list[Json]:
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([content.numel()])
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        distributed.all_gather(lengths, length, group=group)
        padded = torch.zeros(int(torch.cat(lengths).max()), dtype=torch.uint8)
        padded[: content.numel()] = content
        found = [torch.empty_like(padded) for _ in range(self.size)]
        distributed.all_gather(found, padded, group=group)
        return [
            json.loads(bytes(each[: int(size)].numpy()))
            for each, size in zip(found, lengths, strict=True)
        ]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let every process fail where one does, and wait for all at the end.

        Raises:
            CheckpointError: If another process failed; its own failure is raised as it is.
        """
        failure: CheckpointError | OSError | None = None
        try:
            yield
        except (CheckpointError, OSError) as error:
            failure = error
        if self._group is None:
            if failure is not None:
                raise failure
            return
        mine = None
        if failure is not None:
            is_mismatch = isinstance(failure, CheckpointMismatchError)
            mine = {"is_mismatch": is_mismatch, "message": str(failure)}
        try:
            reports = self.gather(mine)
        except CheckpointError as error:
            # What failed here is nearer to the reason than that nobody answers.
            raise failure or error from error
        if failure is not None:
            raise failure
        for rank, report in enumerate(reports):
            if report is not None:
                kind = CheckpointMismatchError if report["is_mismatch"] else CheckpointError
                raise kind(f"rank {rank}: {report['message']}")

    def exchange(
        self, sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]]
    ) -> None:
        """Send tensors to other processes and receive theirs, in the same order on both sides.

        Args:
            sent: Rank and contiguous CPU tensor.
            received: Rank and contiguous CPU tensor to fill.

        Raises:
            CheckpointError: If a process is gone.
        """
        try:
            self._exchange(sent, received)
        except RuntimeError as error:
            raise CheckpointError(
                f"a process of the run is gone, or does not answer: {error}"
            ) from error

    def _exchange(
        self, sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]]
    ) -> None:
        works = [
            distributed.isend(_bytes(each), rank, group=self._group) for rank, each in sent
        ] + [distributed.irecv(_bytes(each), rank, group=self._group) for rank, each in received]
        for work in works:
            if work is not None:
                work.wait()


def _bytes(tensor: Tensor) -> Tensor:
    """View any dtype as one that every backend sends."""
    return tensor.view(-1).view(torch.uint8)

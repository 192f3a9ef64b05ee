"""Keys and values that go around the processes of a context group, and the way back."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup, Work

# Messages of gradients are told from those of keys and values by their tag.
_KEYS, _GRADIENTS = 0, 1


@dataclass(frozen=True, slots=True)
class Ring:
    """The processes of a context group, each of which sends to the next."""

    group: ProcessGroup
    size: int
    """Processes."""
    rank: int
    """Number of this one, from 0."""

    def neighbour(self, step: int) -> int:
        """Return the number, among all processes, of the one so many steps behind this one."""
        return distributed.get_global_rank(self.group, (self.rank + step) % self.size)

    def visits(self, packed: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield keys and values of each process, while the next are on their way.

        Args:
            packed: This process's own.

        Yields:
            The rank of the process, this one first, and what is its own.
        """
        for step in range(self.size):
            is_last = step == self.size - 1
            coming, works = (packed, []) if is_last else self._pass_on(packed, _KEYS)
            yield (self.rank - step) % self.size, packed
            _wait(works)
            packed = coming

    def visits_back(
        self, packed: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield them again, with zeros in which their gradients of this process are to be put.

        Args:
            packed: This process's own keys and values.
            dtype: Of the gradients.

        Yields:
            Rank, keys and values, gradients. After the last the gradients of this process's own
            are complete: those are yielded once more, with rank -1.
        """
        arriving: Tensor | None = None
        works: list[Work] = []
        for step in range(self.size):
            is_last = step == self.size - 1
            coming, on_way = (packed, []) if is_last else self._pass_on(packed, _KEYS)
            gradients = torch.zeros_like(packed, dtype=dtype)
            yield (self.rank - step) % self.size, packed, gradients
            _wait(on_way)
            _wait(works)
            if arriving is not None:
                gradients += arriving
            arriving, works = self._pass_on(gradients, _GRADIENTS)
            packed = coming
        _wait(works)
        if arriving is None:
            raise RuntimeError("a ring has at least one process")
        yield -1, packed, arriving

    def _pass_on(self, x: Tensor, tag: int) -> tuple[Tensor, list[Work]]:
        """Start sending to the next process what it has to know, and receiving the same."""
        coming = torch.empty_like(x)
        operations = [
            distributed.P2POp(distributed.isend, x, self.neighbour(1), self.group, tag),
            distributed.P2POp(distributed.irecv, coming, self.neighbour(-1), self.group, tag),
        ]
        return coming, distributed.batch_isend_irecv(operations)


def _wait(works: list[Work]) -> None:
    for each in works:
        each.wait()

"""Messages between the processes of a pipeline: activations one way, their gradients the other."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)
_MOST_TENSORS, _MOST_DIMS = 6, 6
_ROW = 3 + _MOST_DIMS
"""Of a description: dtype, whether there is a gradient, number of dims, sizes."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What a receiver has to know of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    has_gradient: bool


@dataclass(frozen=True, slots=True)
class Arriving:
    """Tensors on their way here."""

    tensors: tuple[Tensor, ...]
    specs: tuple[Spec, ...]
    works: tuple[distributed.Work, ...]

    def wait(self) -> tuple[Tensor, ...]:
        """Wait for them; on a GPU its stream does."""
        for each in self.works:
            each.wait()
        return self.tensors


class Exchange:
    """Point-to-point messages inside one pipeline, in an order that both sides share.

    The first message of each kind is described by one before it, so that nobody has to know what
    a model passes on; later ones of that kind are not.

    Args:
        group: The processes of the pipeline.
        device: Where tensors are.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._known: dict[Hashable, tuple[Spec, ...]] = {}
        self._sent: list[tuple[distributed.Work, Tensor]] = []

    def send(self, tensors: Sequence[Tensor], peer: int, kind: Hashable) -> None:
        """Send tensors; does not wait.

        Args:
            tensors: Detached or not, at most six of at most six dims.
            peer: Rank in the pipeline.
            kind: Messages of equal kind have equal shapes and dtypes; known to both sides.

        Raises:
            ValueError: If they cannot be described or differ from others of their kind.
        """
        specs = tuple(Spec(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors)
        if kind not in self._known:
            self._known[kind] = specs
            self._put(_describe(specs).to(self._device), peer)
        elif self._known[kind] != specs:
            raise ValueError(
                f"a pipeline stage passes on {specs}, but {self._known[kind]} before for rows of"
                " the same shape"
            )
        self.send_known(tensors, peer)

    def send_known(self, tensors: Sequence[Tensor], peer: int) -> None:
        """Send tensors of which the receiver knows shapes and dtypes; does not wait."""
        self._sent = [(work, each) for work, each in self._sent if not work.is_completed()]
        for each in tensors:
            self._put(each.detach().contiguous(), peer)

    def receive(self, peer: int, kind: Hashable) -> Arriving:
        """Begin to receive tensors that `send` sends; waits only for the first of their kind."""
        if kind not in self._known:
            description = torch.empty(
                1 + _MOST_TENSORS * _ROW, dtype=torch.int64, device=self._device
            )
            self._take(description, peer).wait()
            self._known[kind] = _read(description.tolist())
        return self.receive_known(self._known[kind], peer)

    def specs(self, kind: Hashable) -> tuple[Spec, ...]:
        """Return what messages of a kind are made of, once one was sent or received."""
        return self._known[kind]

    def receive_known(self, specs: Sequence[Spec], peer: int) -> Arriving:
        """Begin to receive tensors of known shapes and dtypes."""
        tensors = tuple(
            torch.empty(each.shape, dtype=each.dtype, device=self._device) for each in specs
        )
        works = tuple(self._take(each, peer) for each in tensors)
        return Arriving(tensors, tuple(specs), works)

    def finish(self) -> None:
        """Wait until everything that was sent is out of memory that may now be reused."""
        for work, _ in self._sent:
            work.wait()
        self._sent = []

    def _put(self, tensor: Tensor, peer: int) -> None:
        work = distributed.isend(tensor, group=self._group, group_dst=peer)
        self._sent.append((_checked(work), tensor))

    def _take(self, tensor: Tensor, peer: int) -> distributed.Work:
        return _checked(distributed.irecv(tensor, group=self._group, group_src=peer))


def _checked(work: distributed.Work | None) -> distributed.Work:
    if work is None:
        raise RuntimeError("this process is not part of the pipeline that it sends in")
    return work


def _describe(specs: Sequence[Spec]) -> Tensor:
    if len(specs) > _MOST_TENSORS or any(len(each.shape) > _MOST_DIMS for each in specs):
        raise ValueError(
            f"a pipeline stage passes on at most {_MOST_TENSORS} tensors of {_MOST_DIMS} dims, got"
            f" {[each.shape for each in specs]}"
        )
    numbers = [len(specs)]
    for each in specs:
        sizes = (*each.shape, *[0] * (_MOST_DIMS - len(each.shape)))
        numbers += [_DTYPES.index(each.dtype), each.has_gradient, len(each.shape), *sizes]
    numbers += [0] * (1 + _MOST_TENSORS * _ROW - len(numbers))
    return torch.tensor(numbers, dtype=torch.int64)


def _read(numbers: Sequence[int]) -> tuple[Spec, ...]:
    specs = []
    for index in range(numbers[0]):
        dtype, has_gradient, dims, *sizes = numbers[1 + index * _ROW : 1 + (index + 1) * _ROW]
        specs.append(Spec(tuple(sizes[:dims]), _DTYPES[dtype], bool(has_gradient)))
    return tuple(specs)

"""Distributed data parallel: the whole model in each process, gradients summed in buckets.

Source: Li et al. 2020, "PyTorch Distributed" (arXiv:2006.15704): buckets in the order in which
gradients become ready, summed while the backward pass goes on. Buckets are at least fp32 here, so
that a low-precision model's gradients are added up exactly as in one process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from lme_parallel.placement import Masters, drop_gradients, saved_buffers
from lme_parallel.shards import Shard, whole

BUCKET_BYTES = 25 * 2**20


@dataclass(slots=True)
class Bucket:
    """Parameters whose gradients are one message."""

    names: tuple[str, ...]
    views: Mapping[str, Tensor]
    """Gradient of each, inside `flat`."""
    flat: Tensor
    group: ProcessGroup
    """The processes over which they are summed."""
    missing: set[str] = field(default_factory=set)
    """Those whose gradient of the last micro step is not there yet."""
    is_sent: bool = False


class ReplicatedParameters:
    """Each process holds and updates everything; gradients are the sums over processes.

    Args:
        model: With values, the same in each process.
        masters: fp32 parameters, where the model's own are lower.
        group: The processes.
        groups: Those that share a parameter, by name, where they are others.
        communication_dtype: Of the messages; `None`: that of the parameters that are updated.
        overlap: Whether sums start while the backward pass still runs; it needs each parameter's
            gradient to become ready once a pass.
    """

    def __init__(
        self,
        model: nn.Module,
        masters: Masters | None,
        group: ProcessGroup,
        *,
        groups: Mapping[str, ProcessGroup],
        communication_dtype: torch.dtype | None,
        overlap: bool,
    ) -> None:
        self._model = model
        self._masters = masters
        self._communication_dtype = communication_dtype
        self._overlap = overlap
        own = dict(model.named_parameters())
        of_each = {name: groups.get(name, group) for name in own}
        self._firsts = {name: distributed.get_rank(each) == 0 for name, each in of_each.items()}
        self._parameters = own if masters is None else dict(masters.named_parameters())
        trained = [name for name, each in own.items() if each.requires_grad]
        self._bucket_of = {}
        # The last parameters' gradients are ready first.
        self._buckets = _make_buckets(
            {name: self._parameters[name] for name in reversed(trained)}, of_each
        )
        for bucket in self._buckets:
            self._bucket_of.update(dict.fromkeys(bucket.names, bucket))
        self._is_last = True
        self._sums: list[tuple[Bucket, Tensor, distributed.Work]] = []
        for name in trained:
            own[name].register_post_accumulate_grad_hook(_Collect(self, name))

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters, or their masters."""
        return self._parameters

    def named_buffers(self) -> Mapping[str, Tensor]:
        """Return the buffers that are saved."""
        return saved_buffers(self._model)

    def shards(self) -> Mapping[str, Shard]:
        """Return that all is here, and that the first process that has it speaks for it."""
        return {
            name: whole(each.shape, is_owner=self._firsts[name])
            for name, each in self._parameters.items()
        }

    def forward_module(self) -> nn.Module:
        """Return the model."""
        return self._model

    def begin(self, *, is_last: bool) -> None:
        """Expect each gradient once more."""
        self._is_last = is_last
        for bucket in self._buckets:
            bucket.missing = set(bucket.names)
            bucket.is_sent = False

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass; gradients collect in the buckets."""
        loss.backward()
        if self._is_last:
            for bucket in self._buckets:
                self._send(bucket)

    def collect(self, name: str, parameter: Tensor) -> None:
        """Move a gradient that became ready into its bucket."""
        if parameter.grad is None:
            return
        bucket = self._bucket_of[name]
        bucket.views[name].add_(parameter.grad)
        parameter.grad = None
        bucket.missing.discard(name)
        if self._is_last and self._overlap and not bucket.missing:
            self._send_up_to(bucket)

    def finish(self) -> None:
        """Wait for the sums and hand them to the parameters."""
        for bucket, message, work in self._sums:
            work.wait()
            if message is not bucket.flat:
                bucket.flat.copy_(message)
        self._sums = []
        for bucket in self._buckets:
            for name in bucket.names:
                self._parameters[name].grad = bucket.views[name]

    @torch.no_grad()
    def refresh(self) -> None:
        """Empty the buckets and renew the low-precision copies."""
        drop_gradients(self._parameters)
        for bucket in self._buckets:
            bucket.flat.zero_()
        if self._masters is not None:
            self._masters.refresh()

    def _send_up_to(self, ready: Bucket) -> None:
        """Send in the order of the buckets, which is the same in each process."""
        for bucket in self._buckets:
            if bucket.missing:
                return
            self._send(bucket)
            if bucket is ready:
                return

    def _send(self, bucket: Bucket) -> None:
        if bucket.is_sent:
            return
        bucket.is_sent = True
        message = bucket.flat
        if self._communication_dtype is not None:
            message = message.to(self._communication_dtype)
        work = distributed.all_reduce(message, group=bucket.group, async_op=True)
        if work is None:
            raise RuntimeError("this process is not part of the group that sums its gradients")
        self._sums.append((bucket, message, work))


@dataclass(frozen=True, slots=True)
class _Collect:
    """The hook of one parameter."""

    owner: ReplicatedParameters
    name: str

    def __call__(self, parameter: Tensor) -> None:
        self.owner.collect(self.name, parameter)


def _make_buckets(
    parameters: Mapping[str, nn.Parameter], group_of: Mapping[str, ProcessGroup]
) -> list[Bucket]:
    """Group parameters of one dtype, device and group, in order, into buckets of about 25 MiB."""
    names: list[list[str]] = []
    # The bucket of a kind that is not full, and its bytes.
    last: dict[tuple[object, ...], tuple[list[str], int]] = {}
    for name, each in parameters.items():
        kind = (each.dtype, each.device, group_of[name].group_name)
        members, size = last.get(kind, ([], BUCKET_BYTES))
        if size >= BUCKET_BYTES:
            members, size = [], 0
            names.append(members)
        members.append(name)
        last[kind] = (members, size + each.numel() * each.element_size())
    return [
        _make_bucket({name: parameters[name] for name in each}, group_of[each[0]]) for each in names
    ]


def _make_bucket(parameters: Mapping[str, nn.Parameter], group: ProcessGroup) -> Bucket:
    first = next(iter(parameters.values()))
    sizes: Sequence[int] = [each.numel() for each in parameters.values()]
    flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
    views = {
        name: part.view(each.shape)
        for (name, each), part in zip(parameters.items(), flat.split(list(sizes)), strict=True)
    }
    return Bucket(tuple(parameters), views, flat, group)

"""Process groups along the axes of a topology."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lme_parallel.topology import Topology

_OPS = {"sum": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX}


@dataclass(frozen=True, slots=True)
class Mesh:
    """The processes of a run by axis: `pipeline`, `replicate`, `shard`, `tensor`."""

    root: DeviceMesh
    """All processes; axes of size 1 are there too."""
    data: ProcessGroup
    """Those with other rows, or other parts of them: over `replicate` and `shard`."""
    experts: DeviceMesh | None = None
    """All processes by `pipeline`, `expert_replicate`, `expert_shard`, `expert`, `tensor`, where
    experts are divided."""
    contexts: ProcessGroup | None = None
    """Those with other parts of the same rows, where sequences are cut."""

    @classmethod
    def of(cls, topology: Topology, device: torch.device) -> "Mesh":
        """Make the groups; every process calls this at the same time.

        Args:
            topology: Sizes of the axes.
            device: This process's device; only its type matters.
        """
        root = init_device_mesh(
            device.type,
            (topology.pipeline, topology.replicate, topology.shard, topology.tensor),
            mesh_dim_names=("pipeline", "replicate", "shard", "tensor"),
        )
        if topology.pipeline == topology.tensor == 1:
            # Nobody else is there: no group has to be made.
            world = distributed.group.WORLD
            if world is None:
                raise RuntimeError("a mesh needs a process group; start one first")
            return cls(root, world, _expert_mesh(topology, device), _context_group(topology))
        data = root["replicate", "shard"]._flatten("data").get_group()
        return cls(root, data, _expert_mesh(topology, device), _context_group(topology))

    @property
    def sharding(self) -> DeviceMesh:
        """Over which parameters are cut (last axis) and copied (first of two)."""
        if self.root.size(1) == 1:
            return self.root["shard"]
        return self.root["replicate", "shard"]

    @property
    def context(self) -> ProcessGroup:
        """`contexts`, where sequences are cut.

        Raises:
            RuntimeError: If they are not.
        """
        if self.contexts is None:
            raise RuntimeError("a mesh has groups for sequences where they are cut only")
        return self.contexts

    @property
    def expert_mesh(self) -> DeviceMesh:
        """`experts`, where they are divided.

        Raises:
            RuntimeError: If they are not.
        """
        if self.experts is None:
            raise RuntimeError("a mesh has groups for experts where they are divided only")
        return self.experts

    @property
    def expert_sharding(self) -> DeviceMesh:
        """As `sharding`, of the experts of this process."""
        if self.root["replicate"].size() == 1:
            return self.expert_mesh["expert_shard"]
        return self.expert_mesh["expert_replicate", "expert_shard"]

    def reduce(self, tensor: Tensor, op: str) -> Tensor:
        """Combine a tensor over processes: `sum` over those with other rows, `max` over all.

        Args:
            tensor: On the host or the device; not changed.
            op: `sum` or `max`.

        Returns:
            The result, on the same device. One on the device is not waited for.
        """
        result = tensor.detach().clone()
        group = self.data if op == "sum" else None
        distributed.all_reduce(result, op=_OPS[op], group=group)
        return result

    def sum_over_all(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes; not changed."""
        result = tensor.detach().clone()
        distributed.all_reduce(result)
        return result

    def sum_together(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Add up tensors over those with other rows, in one message.

        Args:
            tensors: Losses and statistics of any shape, on one device. Sums are taken in fp64,
                which holds counts to 2**53.

        Returns:
            The sums, in the shapes and dtypes given.
        """
        flat = torch.cat([each.detach().double().flatten() for each in tensors])
        distributed.all_reduce(flat, group=self.data)
        totals = flat.split([each.numel() for each in tensors])
        return [
            total.view(each.shape).to(each.dtype)
            for total, each in zip(totals, tensors, strict=True)
        ]


def _expert_mesh(topology: Topology, device: torch.device) -> DeviceMesh | None:
    if topology.expert == 1:
        return None
    sizes = {
        "pipeline": topology.pipeline,
        "expert_replicate": topology.expert_replicate,
        "expert_shard": topology.expert_shard,
        "expert": topology.expert,
        "tensor": topology.tensor,
    }
    return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def _context_group(topology: Topology) -> ProcessGroup | None:
    """Make the groups of processes with parts of the same rows; return this one's."""
    if topology.context == 1:
        return None
    ranks = torch.arange(topology.world_size).view(-1, topology.context, topology.tensor)
    groups = ranks.transpose(1, 2).flatten(0, 1).tolist()
    group, _ = distributed.new_subgroups_by_enumeration(groups)
    if not isinstance(group, ProcessGroup):
        raise RuntimeError("every process is in one of the groups")
    return group

"""Parameters of the stages that are here; those that two stages hold are updated as one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from lme_parallel.placement import Placement, PlacementAround
from lme_parallel.shards import Shard


@dataclass(frozen=True, slots=True)
class Tie:
    """Parameters that this process and one other hold, whole or the same part of."""

    names: frozenset[str]
    group: ProcessGroup
    peer: int
    """The other process, by its rank in the group."""
    is_owner: bool
    """Whether this process speaks for them."""


class StageParameters(PlacementAround):
    """A placement of the parameters of some stages.

    Args:
        placement: Of what is here.
        tie: What is also elsewhere; `None`: nothing is.
    """

    def __init__(self, placement: Placement, tie: Tie | None) -> None:
        super().__init__(placement)
        self._tie = tie

    def shards(self) -> Mapping[str, Shard]:
        """Return which part of each parameter is here; of what two stages hold, one is the owner."""
        shards = self._placement.shards()
        if self._tie is None or self._tie.is_owner:
            return shards
        return {
            name: replace(each, is_owner=False) if name in self._tie.names else each
            for name, each in shards.items()
        }

    @torch.no_grad()
    def finish(self) -> None:
        """Complete gradients; those of what two stages hold are the sum of both."""
        self._placement.finish()
        if self._tie is None:
            return
        named = self._placement.named_parameters()
        # In the order of the names, which is the same on both sides.
        shared = [named[name] for name in sorted(self._tie.names) if named[name].requires_grad]
        for each in shared:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
            own = each.grad.contiguous()
            other = torch.empty_like(own)
            sent = distributed.P2POp(
                distributed.isend, own, group=self._tie.group, group_peer=self._tie.peer
            )
            received = distributed.P2POp(
                distributed.irecv, other, group=self._tie.group, group_peer=self._tie.peer
            )
            for work in distributed.batch_isend_irecv([sent, received]):
                work.wait()
            # Both sides add the same two numbers, so that both get the same bits.
            each.grad = own + other

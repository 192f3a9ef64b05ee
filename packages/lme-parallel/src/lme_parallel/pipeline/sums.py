"""Losses and statistics of all stages, on every process."""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Term:
    """A sum, and what it is divided by."""

    total: Tensor
    per: str
    weight: float


Terms = dict[str, tuple[Tensor, str, float]]
"""Name to sum, the count it is divided by, and its weight in the loss."""


class StageSums:
    """Adds up over the stages of a pipeline what each of them computed.

    Args:
        group: The processes of the pipeline.
        device: Where sums are.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        # What all stages have, by what is here.
        self._known: dict[Hashable, list[list[Any]]] = {}

    def complete(self, targets: Tensor | int, terms: Terms) -> tuple[Tensor, Terms]:
        """Return the sums over all stages, with the terms of all of them in one order.

        Which terms others have is asked once for each set of terms here: they are those of the
        layers, and of batches that all processes of a pipeline share.

        Args:
            targets: Of the stages that are here, 0-d.
            terms: Of the stages that are here.
        """
        own = [
            [name, per, weight, list(total.shape), str(total.dtype)]
            for name, (total, per, weight) in terms.items()
        ]
        key = json.dumps(own)
        if key not in self._known:
            self._known[key] = _merge(self._gather(own))
        described = self._known[key]
        found = [torch.as_tensor(targets, device=self._device)]
        for name, _, _, shape, dtype in described:
            kind = getattr(torch, dtype.removeprefix("torch."))
            is_here = name in terms
            found.append(
                terms[name][0] if is_here else torch.zeros(shape, dtype=kind, device=self._device)
            )
        total_targets, *totals = self._add_up(found)
        return total_targets, {
            name: (total, per, weight)
            for total, (name, per, weight, _, _) in zip(totals, described, strict=True)
        }

    def merge(self, stages: Sequence[Any]) -> Any:
        """Return the sums over all stages of one batch.

        Args:
            stages: An objective's sums of each stage that is here.

        Returns:
            Sums of the objective's kind.
        """
        terms: Terms = {"": (torch.stack([each.total for each in stages]).sum(), "", 1.0)}
        for each in stages:
            for name, term in each.extras.items():
                known = terms[name][0] + term.total if name in terms else term.total
                terms[name] = (known, term.per, term.weight)
        targets = torch.stack([each.targets for each in stages]).sum()
        targets, terms = self.complete(targets, terms)
        total, _, _ = terms.pop("")
        extras = {name: Term(*term) for name, term in terms.items()}
        return replace(stages[0], total=total, targets=targets, extras=extras)

    def _add_up(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Add up tensors over the processes of the pipeline, in one message and in fp64."""
        flat = torch.cat([each.detach().double().flatten() for each in tensors])
        distributed.all_reduce(flat, group=self._group)
        totals = flat.split([each.numel() for each in tensors])
        return [
            total.view(each.shape).to(each.dtype)
            for total, each in zip(totals, tensors, strict=True)
        ]

    def _gather(self, own: list[list[Any]]) -> list[list[list[Any]]]:
        size = distributed.get_world_size(self._group)
        content = torch.frombuffer(bytearray(json.dumps(own).encode()), dtype=torch.uint8)
        length = torch.tensor([content.numel()], device=self._device)
        lengths = [torch.zeros_like(length) for _ in range(size)]
        distributed.all_gather(lengths, length, group=self._group)
        most = int(torch.cat(lengths).max())
        padded = torch.zeros(most, dtype=torch.uint8, device=self._device)
        padded[: content.numel()] = content.to(self._device)
        found = [torch.empty_like(padded) for _ in range(size)]
        distributed.all_gather(found, padded, group=self._group)
        return [
            json.loads(bytes(each[: int(count)].cpu().numpy()))
            for each, count in zip(found, lengths, strict=True)
        ]


def _merge(listed: Sequence[list[list[Any]]]) -> list[list[Any]]:
    """Put together what the processes have; the first that has a name describes it."""
    found: dict[str, list[Any]] = {}
    for each in listed:
        for term in each:
            found.setdefault(term[0], term)
    return list(found.values())

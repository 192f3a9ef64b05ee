"""Runs steps and evaluations of a pipeline in the orders of its schedule."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from lme_parallel.pipeline.orders import Action, Kind, compute_orders, forward_orders
from lme_parallel.pipeline.plan import Step, add_transfers
from lme_parallel.pipeline.run import Batch, Objective, Part, Run, StepCalls, Sums


class Runner:
    """Computes what a schedule says, and exchanges what stages need.

    Args:
        part: What is here.
    """

    def __init__(self, part: Part) -> None:
        self._part = part
        self._plans: dict[int, list[Step]] = {}
        orders = forward_orders(part.schedule)
        self._evaluation = add_transfers(part.schedule, orders)[part.rank]

    def check(self, micro_batches: int) -> None:
        """Raise unless the schedule can run so many micro batches.

        Raises:
            ValueError: If not, with the next number that works.
        """
        self._part.schedule.check_micro_batches(micro_batches)

    def train(self, batches: Sequence[Batch], calls: StepCalls) -> None:
        """Run forward and backward passes of a step.

        Args:
            batches: Micro batches, on the device; the same in each process of the pipeline.
            calls: What to do with them.

        Raises:
            ValueError: As of `check`.
        """
        part, count = self._part, len(batches)
        if count not in self._plans:
            orders = compute_orders(part.schedule, count)
            if not part.splits:
                orders = [_joined(order) for order in orders]
            self._plans[count] = add_transfers(part.schedule, orders)[part.rank]
        Run(part, batches, calls, self._plans[count]).run()

    @torch.no_grad()
    def evaluate(self, objective: Objective, batch: Batch) -> list[Sums]:
        """Run one forward pass; returns the sums of each stage that is here."""
        found: list[Sums] = []
        calls = StepCalls(objective, lambda sums: sums.total, found.append, lambda _: None)
        Run(self._part, [batch], calls, self._evaluation).run()
        return found


def _joined(order: Sequence[Action]) -> list[Action]:
    """Compute both kinds of gradients where those of inputs would be."""
    return [
        replace(each, kind=Kind.BACKWARD) if each.kind == Kind.BACKWARD_INPUT else each
        for each in order
        if each.kind != Kind.BACKWARD_WEIGHT
    ]

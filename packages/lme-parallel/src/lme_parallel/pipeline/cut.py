"""Which layers a stage has: contiguous pieces of as equal work as there can be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True, slots=True)
class Costs:
    """Work of the parts of a model, in any one unit."""

    embedding: float
    """Of what comes before the blocks; the first stage has it."""
    blocks: tuple[float, ...]
    """Of each block."""
    head: float
    """Of what comes after the blocks; the last stage has it."""


def cut_layers(costs: Costs, stages: int) -> tuple[range, ...]:
    """Cut a model's layers into stages.

    Of all cuts those are taken whose busiest stage has the least work, and of these the one with
    the most even work: the least sum of squares, and then the earliest ends.

    Args:
        costs: Of the model.
        stages: How many; each gets at least one layer.

    Returns:
        Layers of each stage, in order.

    Raises:
        ValueError: If there are fewer layers than stages.
    """
    layers = len(costs.blocks)
    if stages > layers:
        raise ValueError(
            f"`num_pipeline_stages` must be at most the model's number of layers ({layers}), got"
            f" {stages}: each stage needs a layer"
        )
    sums = [0.0, *accumulate(costs.blocks)]

    def work(stage: int, start: int, stop: int) -> float:
        ends = (costs.embedding if stage == 0 else 0.0) + (
            costs.head if stage == stages - 1 else 0.0
        )
        return sums[stop] - sums[start] + ends

    most = _least_maximum(work, layers, stages)
    # best[stop] is the least sum of squares of the stages so far that end at `stop`, and their ends.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(stages):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for stop in _stops(stage, stages, layers):
            found = [
                (squares + work(stage, start, stop) ** 2, (*ends, stop))
                for start, (squares, ends) in best.items()
                if start < stop and work(stage, start, stop) <= most
            ]
            if found:
                longer[stop] = min(found)
        best = longer
    ends = (0, *best[layers][1])
    return tuple(range(start, stop) for start, stop in pairwise(ends))


def stage_works(costs: Costs, cuts: Sequence[range]) -> tuple[float, ...]:
    """Return the work of each stage, in the unit of the costs."""
    works = [sum(costs.blocks[layer] for layer in layers) for layers in cuts]
    works[0] += costs.embedding
    works[-1] += costs.head
    return tuple(works)


def _least_maximum(work: Callable[[int, int, int], float], layers: int, stages: int) -> float:
    best = {0: 0.0}
    for stage in range(stages):
        best = {
            stop: min(
                max(most, work(stage, start, stop)) for start, most in best.items() if start < stop
            )
            for stop in _stops(stage, stages, layers)
        }
    return best[layers]


def _stops(stage: int, stages: int, layers: int) -> Sequence[int]:
    """Where a stage may end so that each other one can have a layer."""
    last = layers - (stages - 1 - stage)
    return [layers] if stage == stages - 1 else range(stage + 1, last + 1)

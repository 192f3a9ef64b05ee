"""Computations and messages of a pipeline in one order that no two processes can wait in for ever.

The computations of all processes are played through in rounds, and each message is put where its
sender has computed it, in the lists of both sides. So the messages of any two processes have the
same order on both, and all lists are parts of one order in which nothing comes before what it
needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lme_parallel.pipeline.orders import Action, Kind, Schedule


class Message(StrEnum):
    """What travels, and which side this is."""

    SEND_FORWARD = "send_forward"
    RECEIVE_FORWARD = "receive_forward"
    SEND_GRADIENT = "send_gradient"
    RECEIVE_GRADIENT = "receive_gradient"


@dataclass(frozen=True, slots=True)
class Transfer:
    """One side of a message between two processes."""

    kind: Message
    stage: int
    """Of the activation, or its gradient: the stage that computed the activation."""
    micro: int
    peer: int
    """The other process, by its rank in the pipeline."""


Step = Action | Transfer


def add_transfers(schedule: Schedule, orders: Sequence[Sequence[Action]]) -> list[list[Step]]:
    """Put the messages between processes into their orders.

    Args:
        schedule: Says who has which stage.
        orders: Computations by rank of the pipeline.

    Returns:
        Computations and messages by rank.

    Raises:
        ValueError: If the orders wait for each other for ever, or leave something out.
    """
    steps: list[list[Step]] = [[] for _ in orders]
    places = [0] * len(orders)
    done: set[tuple[Kind, int, int]] = set()
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        ready = [
            (rank, order[place])
            for rank, (place, order) in enumerate(zip(places, orders, strict=True))
            if place < len(order) and _is_ready(order[place], schedule.stages, done)
        ]
        if not ready:
            raise ValueError(f"the order of `{schedule.name}` waits for itself")
        for rank, action in ready:
            places[rank] += 1
            steps[rank].append(action)
            done |= {(kind, action.stage, action.micro) for kind in _parts(action.kind)}
            _add_message(steps, schedule, rank, action)
    return steps


def _parts(kind: Kind) -> tuple[Kind, ...]:
    return (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT) if kind == Kind.BACKWARD else (kind,)


def _is_ready(action: Action, stages: int, done: set[tuple[Kind, int, int]]) -> bool:
    stage, micro = action.stage, action.micro
    if action.kind == Kind.FORWARD:
        return stage == 0 or (Kind.FORWARD, stage - 1, micro) in done
    if action.kind == Kind.BACKWARD_WEIGHT:
        return (Kind.BACKWARD_INPUT, stage, micro) in done
    after = stage == stages - 1 or (Kind.BACKWARD_INPUT, stage + 1, micro) in done
    return after and (Kind.FORWARD, stage, micro) in done


def _add_message(steps: list[list[Step]], schedule: Schedule, rank: int, action: Action) -> None:
    stage, micro = action.stage, action.micro
    if action.kind == Kind.FORWARD and stage < schedule.stages - 1:
        kinds, producer, peer = (
            (Message.SEND_FORWARD, Message.RECEIVE_FORWARD),
            stage,
            schedule.rank_of(stage + 1),
        )
    elif action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and stage > 0:
        kinds, producer, peer = (
            (Message.SEND_GRADIENT, Message.RECEIVE_GRADIENT),
            stage - 1,
            schedule.rank_of(stage - 1),
        )
    else:
        return
    if peer == rank:
        return
    steps[rank].append(Transfer(kinds[0], producer, micro, peer))
    steps[peer].append(Transfer(kinds[1], producer, micro, rank))

"""Which process holds up the others, from what all of them report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lme_parallel.watchdog.snapshot import Call, Group, Snapshot

Absence = Literal["gone", "stopped", "silent"]
"""Why a process does not answer: it has ended, it was stopped by a signal, or nobody knows."""

# Collectives in which every process gives as much as any other.
_EQUAL_SIZES = frozenset({"all_reduce", "broadcast", "reduce", "_allgather_base", "all_gather"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who is to blame, in words."""

    ranks: tuple[int, ...]
    """Those that hold up the others; empty if nothing tells them from the others."""
    sentence: str
    """For people."""


def judge(snapshots: Mapping[int, Snapshot], absent: Mapping[int, Absence]) -> Verdict:
    """Find those that the others wait for.

    In this order: who is gone, stopped or silent; who raised an error of its own; who came to its
    end; who does not wait in a collective, and among those the ones that are behind; whose
    collectives differ from those of most.

    Args:
        snapshots: By rank: what each reported just now, or last, if it does not answer.
        absent: Those that do not answer, and why.

    Returns:
        The verdict.
    """
    present = {rank: each for rank, each in snapshots.items() if rank not in absent}
    running = {rank: each for rank, each in present.items() if each.state == "running"}
    failed = [rank for rank, each in present.items() if each.state == "failed"]
    left = [rank for rank, each in present.items() if each.state == "left"]
    if absent:
        return _verdict(
            absent, [_absence(rank, absent[rank], snapshots) for rank in absent], present
        )
    if failed:
        return _verdict(failed, [_failure(present[rank]) for rank in failed], present)
    if left and len(left) < len(present):
        said = [f"rank {rank} has left, at its end in {present[rank].phase}" for rank in left]
        return _verdict(left, said, present)
    busy = [rank for rank, each in running.items() if each.waits_in is None]
    if busy:
        behind = [rank for rank in busy if rank in _behind(present)]
        chosen = behind or busy
        return _verdict(chosen, [_where(present[rank]) for rank in chosen], present)
    return _odd_ones(present)


def name_ranks(ranks: Sequence[int]) -> str:
    """Write `rank 2`, or `ranks 0, 1, 3`, or `ranks 0-2, 5` with runs of three or more."""
    ordered = sorted(ranks)
    parts: list[str] = []
    start = 0
    for place, rank in enumerate(ordered):
        if place + 1 < len(ordered) and ordered[place + 1] == rank + 1:
            continue
        run = ordered[start : place + 1]
        parts += [f"{run[0]}-{run[-1]}"] if len(run) > 3 else [str(each) for each in run]
        start = place + 1
    return f"rank{'s' if len(ordered) > 1 else ''} {', '.join(parts)}"


def _verdict(
    ranks: Sequence[int] | Mapping[int, Absence],
    said: Sequence[str],
    present: Mapping[int, Snapshot],
) -> Verdict:
    others = [each for rank, each in present.items() if rank not in ranks]
    return Verdict(tuple(sorted(ranks)), "; ".join([*said, *_waiting(others)]))


def _waiting(others: Sequence[Snapshot]) -> list[str]:
    places: dict[str, list[int]] = {}
    for each in others:
        if each.state == "lost":
            doing = f"lost the connection in {each.waits_in or each.phase}"
        elif each.state == "running":
            doing = f"in {each.phase}" if each.waits_in is None else f"wait in {each.waits_in}"
        else:
            continue
        places.setdefault(doing, []).append(each.rank)
    return [_sentence(ranks, doing) for doing, ranks in places.items()]


def _sentence(ranks: Sequence[int], doing: str) -> str:
    if len(ranks) == 1 and doing.startswith("wait in"):
        doing = "waits" + doing.removeprefix("wait")
    if doing.startswith("in "):
        doing = f"{'is' if len(ranks) == 1 else 'are'} {doing}"
    return f"{name_ranks(ranks)} {doing}"


def _where(each: Snapshot) -> str:
    return f"rank {each.rank} has been in {each.phase} at {each.location} for {each.seconds:.0f} s"


def _failure(each: Snapshot) -> str:
    return f"rank {each.rank} failed in {each.phase} at {each.location}: {each.message}"


def _absence(rank: int, why: Absence, snapshots: Mapping[int, Snapshot]) -> str:
    how = {
        "gone": "has ended without a word",
        "stopped": "was stopped by a signal",
        "silent": "does not answer",
    }[why]
    last = snapshots.get(rank)
    if last is None:
        return f"rank {rank} {how}; it never reported"
    process = f" (process {last.process} on {last.host})"
    return f"rank {rank}{process} {how}, last seen in {last.phase} at {last.location}"


def _behind(present: Mapping[int, Snapshot]) -> set[int]:
    """Those that did not call a collective that another member of the group waits for."""
    found: set[int] = set()
    for histories in _histories(present).values():
        ahead = max(calls[-1].number for calls in histories.values())
        is_awaited = any(not calls[-1].is_done for calls in histories.values())
        last = {rank: calls[-1].number for rank, calls in histories.items()}
        if is_awaited:
            found.update(rank for rank, number in last.items() if number < ahead)
    return found


def _odd_ones(present: Mapping[int, Snapshot]) -> Verdict:
    """All wait: find those whose collectives are others than those of most, then those behind."""
    for histories in _histories(present).values():
        calls = {rank: {call.number: call for call in each} for rank, each in histories.items()}
        known = set.intersection(*(set(each) for each in calls.values()))
        for number in sorted(known):
            kinds = {rank: _kind(each[number]) for rank, each in calls.items()}
            odd = _minority(kinds)
            if odd:
                usual = Counter(kinds.values()).most_common(1)[0][0]
                said = [
                    f"rank {rank} called {kinds[rank]} at {present[rank].location} where the"
                    f" others called {usual} (collective {number} of their group)"
                    for rank in odd
                ]
                return _verdict(odd, said, present)
    behind = sorted(_behind(present))
    if behind:
        return _verdict(behind, [_where(present[rank]) for rank in behind], present)
    waits = {rank: f"{each.waits_in} {each.location}" for rank, each in present.items()}
    odd = _minority(waits)
    if odd:
        said = [
            f"rank {rank} has been in {present[rank].phase}, in {present[rank].waits_in} at"
            f" {present[rank].location}, for {present[rank].seconds:.0f} s"
            for rank in odd
        ]
        return _verdict(odd, said, present)
    where = next(iter(present.values()))
    listed = "; ".join(_waiting(list(present.values())))
    return Verdict((), f"no rank is ahead of the others: {listed}, at {where.location}")


def _kind(call: Call) -> str:
    if call.name.removeprefix("gloo:") not in _EQUAL_SIZES:
        return call.name
    shapes = ", ".join("x".join(map(str, size)) or "1" for size in call.sizes)
    return f"{call.name} of {shapes}" if shapes else call.name


def _minority(kinds: Mapping[int, str]) -> list[int]:
    """Those that differ from most; nobody if there is no most, or no difference."""
    (kind, count), *rest = Counter(kinds.values()).most_common()
    if not rest:
        return []
    if 2 * count <= len(kinds):
        return sorted(kinds)
    return sorted(rank for rank, each in kinds.items() if each != kind)


def _histories(present: Mapping[int, Snapshot]) -> dict[tuple[str, str], dict[int, list[Call]]]:
    """Calls by group and member, of groups in which at least two members reported."""
    found: dict[tuple[str, str], dict[int, list[Call]]] = {}
    for rank, each in present.items():
        for group in each.groups:
            if group.calls:
                found.setdefault(_key(group), {})[rank] = group.calls
    return {key: each for key, each in found.items() if len(each) > 1}


def _key(group: Group) -> tuple[str, str]:
    # Groups of different members may share a name.
    return group.name, ",".join(map(str, group.members))

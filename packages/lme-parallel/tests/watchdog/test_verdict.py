from dataclasses import replace

import pytest

from lme_parallel.watchdog.snapshot import Call, Group, Snapshot, identity
from lme_parallel.watchdog.verdict import judge, name_ranks


def snapshot(rank, *, waits_in=None, calls=(), seconds=9.0, **changes):
    group = Group("0", [0, 1, 2, 3], list(calls))
    base = Snapshot(
        rank=rank, host="a", process=100 + rank, born=1, phase="clip", location="x.py:1"
    )
    return replace(base, waits_in=waits_in, seconds=seconds, groups=[group], **changes)


def calls(last, *, name="all_reduce", size=8, is_done=False):
    """Collectives 1 to `last`, of which the last one may be under way."""
    return [
        Call(number, name, [[size]], is_done=is_done or number < last)
        for number in range(1, last + 1)
    ]


def group_of(**changes):
    waiting = {rank: snapshot(rank, waits_in="all_reduce", calls=calls(5)) for rank in range(4)}
    return {**waiting, **{each.rank: each for each in changes.values()}}


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([2], "rank 2"), ([3, 0, 1], "ranks 0, 1, 3"), ([*range(9), 11], "ranks 0-8, 11")],
)
def test_ranks_are_listed_briefly(ranks, text):
    assert name_ranks(ranks) == text


def test_who_does_not_wait_is_named_with_phase_line_and_time():
    verdict = judge(group_of(odd=snapshot(2, phase="data", seconds=31.7)), {})
    assert verdict.ranks == (2,)
    assert verdict.sentence == (
        "rank 2 has been in data at x.py:1 for 32 s; ranks 0, 1, 3 wait in all_reduce"
    )


def test_on_a_device_that_is_asked_late_who_is_behind_is_named():
    # The hosts of all processes wait for their device, none inside a collective.
    found = {rank: snapshot(rank, calls=calls(7)) for rank in range(4)}
    found[1] = snapshot(1, calls=calls(6, is_done=True))
    assert judge(found, {}).ranks == (1,)


def test_different_histories_name_the_one_that_differs_first():
    found = group_of()
    own = [*calls(3, is_done=True), Call(4, "broadcast", [[8]], True), *calls(5)[4:]]
    found[3] = snapshot(3, waits_in="all_reduce", calls=own)
    verdict = judge(found, {})
    assert verdict.ranks == (3,)
    assert "called broadcast of 8 at x.py:1 where the others called all_reduce of 8" in (
        verdict.sentence
    )
    assert "(collective 4 of their group)" in verdict.sentence


def test_two_that_disagree_are_both_named():
    found = {
        0: snapshot(0, waits_in="all_reduce", calls=calls(2)),
        1: snapshot(1, waits_in="barrier", calls=calls(2, name="barrier")),
    }
    assert judge(found, {}).ranks == (0, 1)


def test_groups_of_other_members_are_not_compared():
    found = {
        rank: replace(
            snapshot(rank, waits_in="all_reduce"),
            groups=[Group("5", [rank // 2 * 2, rank // 2 * 2 + 1], calls(2, size=1 + rank // 2))],
        )
        for rank in range(4)
    }
    verdict = judge(found, {})
    assert verdict.ranks == ()
    assert "ranks 0-3 wait in all_reduce" in verdict.sentence


def test_an_error_of_ones_own_comes_before_a_lost_connection():
    found = group_of(
        own=snapshot(1, state="failed", message="ValueError: no"),
        victim=snapshot(2, state="lost", waits_in="all_reduce", message="RuntimeError: closed"),
    )
    verdict = judge(found, {})
    assert verdict.ranks == (1,)
    assert "rank 2 lost the connection in all_reduce" in verdict.sentence
    assert "ranks 0, 3 wait in all_reduce" in verdict.sentence


def test_who_is_gone_is_named_before_anybody_else():
    verdict = judge(group_of(busy=snapshot(1)), {3: "gone"})
    assert verdict.ranks == (3,)
    assert verdict.sentence.startswith("rank 3 (process 103 on a) has ended without a word")
    assert "rank 1 is in clip" in verdict.sentence


def test_a_report_survives_its_journey():
    mine = replace(snapshot(3, calls=calls(2)), born=identity(0).born)
    assert Snapshot.decode(mine.encode()) == mine

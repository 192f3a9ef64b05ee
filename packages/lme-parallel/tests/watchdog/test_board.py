import os
from dataclasses import replace

from lme_parallel.watchdog.board import absences
from lme_parallel.watchdog.snapshot import identity


def reports(*ranks):
    """Of processes that run: this one, under several ranks."""
    return {rank: replace(identity(rank), process=os.getpid()) for rank in ranks}


def test_who_does_not_run_is_absent():
    seen = reports(0, 2)
    seen[2] = replace(seen[2], born=seen[2].born + 1)
    assert absences(seen, identity(1), 4) == {2: "gone"}
    assert absences({**seen, 2: replace(seen[2], state="left")}, identity(1), 3) == {0: "silent"}


def test_who_never_reported_is_absent_if_all_others_run():
    assert absences(reports(0, 2), identity(1), 5) == {3: "silent", 4: "silent"}
    assert absences(reports(1), identity(0), 3) == {2: "silent"}


def test_if_all_run_and_reported_the_first_is_absent():
    assert absences(reports(0, 2), identity(1), 3) == {0: "silent"}
    assert absences(reports(1, 2), identity(0), 3) == {}


def test_of_another_host_nothing_is_known():
    seen = {0: replace(identity(0), host="elsewhere", process=1), 2: identity(2)}
    assert absences(seen, identity(1), 3) == {0: "silent"}
    assert absences({1: replace(identity(1), host="elsewhere")}, identity(0), 2) == {}

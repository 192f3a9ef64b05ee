"""Threads of a save in the background run behind those that train."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lme_parallel.checkpoint.priority import BEHIND, go_behind_training


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities by thread")
def test_only_the_thread_and_those_it_starts_go_behind():
    before = priority()
    found = []

    def save():
        go_behind_training()
        go_behind_training()
        with ThreadPoolExecutor(1) as pool:
            found.extend((priority(), pool.submit(priority).result()))

    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    assert found == [max(before, BEHIND)] * 2
    assert priority() == before

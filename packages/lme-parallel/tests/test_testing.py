import os
import signal

import pytest
import torch
from torch import distributed

from lme_parallel.testing import kill_this_process, run_distributed, run_killed


def add_ranks(value):
    total = torch.tensor([float(distributed.get_rank()) + value])
    distributed.all_reduce(total)
    return {"rank": distributed.get_rank(), "total": total}


def fail_on_rank_1():
    if distributed.get_rank() == 1:
        raise ValueError("rank 1 went wrong")
    distributed.barrier()


def sleep_for_ever():
    torch.multiprocessing.Event().wait()


def crash_on_rank_1():
    if distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    distributed.barrier()


def return_quietly():
    return None


def raise_an_error():
    raise ValueError("went wrong")


def test_ranks_talk_to_each_other_and_return_their_results():
    results = run_distributed(add_ranks, 2, 10.0)
    assert [each["rank"] for each in results] == [0, 1]
    assert [each["total"].item() for each in results] == [21.0, 21.0]


def test_the_trace_of_a_failed_rank_is_shown():
    with pytest.raises(RuntimeError, match="rank 1 went wrong"):
        run_distributed(fail_on_rank_1, 2)


def test_the_stack_of_a_rank_that_crashed_is_shown():
    with pytest.raises(RuntimeError, match=r"Segmentation fault(.|\n)*in crash_on_rank_1"):
        run_distributed(crash_on_rank_1, 2)


def test_processes_that_hang_are_killed():
    with pytest.raises(RuntimeError, match=r"killed after 0\.5 seconds"):
        run_distributed(sleep_for_ever, 1, timeout_seconds=0.5)


def test_a_killed_process_is_told_from_one_that_ended():
    assert run_killed(kill_this_process)
    assert run_killed(sleep_for_ever, after_seconds=0.2)
    assert not run_killed(return_quietly)
    with pytest.raises(RuntimeError, match="went wrong"):
        run_killed(raise_an_error)

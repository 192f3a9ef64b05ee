import os
import select
import signal
import subprocess
import sys
import textwrap

import pytest

from lme_parallel.failures import ERROR_FILE_VARIABLE, read_failure, report_failure
from lme_parallel.launch import detect
from lme_parallel.launcher import run_workers, worker_environments


def script(body):
    return [sys.executable, "-S", "-c", "import os, sys, time\n" + textwrap.dedent(body)]


def run(body):
    return run_workers(script(body), worker_environments(2, detect({}), {**os.environ}))


def test_each_process_gets_its_place():
    environments = worker_environments(2, detect({}), {"PATH": "/bin"})
    assert [each["RANK"] for each in environments] == ["0", "1"]
    assert [each["LOCAL_RANK"] for each in environments] == ["0", "1"]
    assert {each["WORLD_SIZE"] for each in environments} == {"2"}
    assert {each["MASTER_ADDR"] for each in environments} == {"127.0.0.1"}
    assert len({each["MASTER_PORT"] for each in environments}) == 1
    assert all(each["PATH"] == "/bin" for each in environments)
    assert detect(environments[1]).rank == 1


def test_the_second_of_two_hosts_continues_the_numbers():
    host = detect({"PET_NODE_RANK": "1", "PET_NNODES": "2", "PET_MASTER_ADDR": "first"})
    environments = worker_environments(4, host, {"OMP_NUM_THREADS": "3"})
    assert [each["RANK"] for each in environments] == ["4", "5", "6", "7"]
    found = detect(environments[0])
    assert (found.world_size, found.local_rank, found.address) == (8, 0, "first")
    assert environments[0]["OMP_NUM_THREADS"] == "3"


def test_hosts_that_do_not_know_the_first_are_refused():
    host = detect({"PET_NODE_RANK": "1", "PET_NNODES": "2"})
    with pytest.raises(ValueError, match="`MASTER_ADDR` is not set, so the 2 hosts"):
        worker_environments(2, host, {})


def test_lines_are_marked_with_their_rank(capfd):
    failure = run(
        """
        rank = os.environ["RANK"]
        print("out", rank)
        print("[rank " + rank + "] known already")
        print("err", rank, file=sys.stderr)
        """
    )
    assert failure is None
    out, err = capfd.readouterr()
    marked = [f"[rank {rank}] {text}" for rank in "01" for text in (f"out {rank}", "known already")]
    assert sorted(out.splitlines()) == sorted(marked)
    assert sorted(err.splitlines()) == ["[rank 0] err 0", "[rank 1] err 1"]


def test_the_first_to_report_is_named_not_the_first_to_end():
    failure = run(
        """
        import json
        # Rank 1 reports and lingers; rank 0 loses it and ends at once.
        name = os.environ["TORCHELASTIC_ERROR_FILE"]
        if os.environ["RANK"] == "1":
            open(name, "w").write(json.dumps({"message": "disk full", "time_ns": 1}))
            time.sleep(60)
        while not os.path.exists(os.path.dirname(name) + "/1.json"):
            time.sleep(0.01)
        open(name, "w").write(json.dumps({"message": "lost a peer", "time_ns": 2}))
        sys.exit(3)
        """
    )
    assert failure is not None
    assert (failure.rank, failure.message) == (1, "disk full")


def test_all_are_ended_when_one_fails():
    # Rank 0 would sleep for a minute.
    failure = run(
        """
        if os.environ["RANK"] == "1":
            sys.exit(7)
        time.sleep(60)
        """
    )
    assert failure is not None
    assert (failure.rank, failure.exit_code, failure.message) == (1, 7, "")


def test_a_process_that_was_killed_is_told_from_one_that_ended():
    failure = run('os.kill(os.getpid(), 9) if os.environ["RANK"] == "0" else time.sleep(60)')
    assert failure is not None
    assert (failure.rank, failure.exit_code) == (0, -9)


LAUNCHER = """
import os, types
from lme_parallel.launcher import run_workers, worker_environments
alone = types.SimpleNamespace(rank=0, world_size=1, address=None, port=0)
print(run_workers({command!r}, worker_environments(2, alone, os.environ)))
"""


def launch(body, *options):
    """Start a launcher in a process of its own."""
    command = [sys.executable, *options, "-c", script(body)[-1]]
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER.format(command=command)], stdout=subprocess.PIPE, text=True
    )


def test_requests_to_end_are_passed_on():
    body = """
        import signal, threading
        asked = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
        print("ready", flush=True)
        asked.wait(60)
        print("asked")
    """
    with launch(body, "-S") as process:
        assert {process.stdout.readline() for _ in range(2)} == {
            "[rank 0] ready\n",
            "[rank 1] ready\n",
        }
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert set(rest.splitlines()) == {"[rank 0] asked", "[rank 1] asked", "None"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent")
def test_processes_end_with_a_launcher_that_was_killed():
    body = """
        from lme_parallel.failures import follow_launcher
        follow_launcher(os.environ)
        print(os.getpid(), flush=True)
        time.sleep(60)
    """
    with launch(body) as process:
        workers = [int(process.stdout.readline().split()[-1]) for _ in range(2)]
        handles = [os.pidfd_open(each) for each in workers]
        process.kill()
        for handle in handles:
            # Readable when the process ended.
            assert select.select([handle], [], [], 10)[0]
            os.close(handle)


def test_a_failure_is_reported_once(tmp_path):
    file = tmp_path / "error.json"
    environment = {ERROR_FILE_VARIABLE: str(file)}
    report_failure(ValueError("first"), environment)
    report_failure(ValueError("second"), environment)
    found = read_failure(file)
    assert found is not None
    assert found[1] == "ValueError: first"
    report_failure(ValueError("nobody listens"), {})
    assert read_failure(tmp_path / "none") is None

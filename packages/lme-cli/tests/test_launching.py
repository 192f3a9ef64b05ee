import pytest

from lme_cli import launching
from lme_cli.commands.train import run_arguments
from lme_cli.errors import CommandError, exit_code
from lme_cli.launching import WorkerFailedError, find_hosts, launch_workers
from lme_parallel.launcher import Failure

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h"}
PODS = {"PET_NODE_RANK": "1", "PET_NNODES": "3", "PET_MASTER_ADDR": "p"}
SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("nproc", "environment", "expected"),
    [
        # Starts workers, all workers, number of its first worker.
        (None, {}, (False, 1, 0)),
        (1, {}, (False, 1, 0)),
        (4, {}, (True, 4, 0)),
        (None, TORCHRUN, (False, 2, 1)),
        # One task a host starts that host's workers.
        (4, SLURM, (True, 8, 4)),
        (None, SLURM, (False, 2, 1)),
        (8, PODS, (True, 24, 8)),
        (None, {**PODS, "PET_NPROC_PER_NODE": "2"}, (True, 6, 2)),
        # torchrun reads the same variables; what it starts is a worker.
        (None, {**PODS, "PET_NPROC_PER_NODE": "2", **TORCHRUN}, (False, 2, 1)),
        (None, {"PET_NPROC_PER_NODE": "auto"}, (False, 1, 0)),
    ],
)
def test_nproc_counts_the_processes_of_each_host(nproc, environment, expected):
    hosts = find_hosts(nproc, environment)
    assert (hosts.starts_workers, hosts.world_size, hosts.first_worker().rank) == expected


def test_nproc_inside_torchrun_is_refused():
    with pytest.raises(CommandError, match="but torchrun started this one as number 1 of its host"):
        find_hosts(2, TORCHRUN)


@pytest.mark.parametrize(
    ("path", "settings", "method", "expected"),
    [
        (None, [], None, ["train"]),
        (
            "run.yml",
            ["a.b=1", "c.d=2"],
            None,
            ["train", "run.yml", "--set", "a.b=1", "--set", "c.d=2"],
        ),
        ("run.yml", [], "pretraining", ["pretrain", "--config", "run.yml"]),
        ("run.yml", [], "full_finetuning", ["finetune", "--config", "run.yml"]),
        ("run.yml", [], "distillation", ["distill", "--config", "run.yml"]),
    ],
)
def test_workers_get_the_same_arguments(path, settings, method, expected):
    assert run_arguments(path, settings, method) == expected


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        (Failure(3, 2, "bad setting"), 2, "rank 3 failed first, with exit code 2: bad setting"),
        (Failure(0, -9, ""), 137, "rank 0 was ended by signal 9"),
    ],
)
def test_a_worker_that_failed_gives_the_exit_code(failure, code, words, monkeypatch):
    monkeypatch.setattr(launching, "run_workers", lambda command, environments: failure)
    with pytest.raises(WorkerFailedError) as caught:
        launch_workers(find_hosts(2, {}), ["train"])
    assert str(caught.value) == words
    assert exit_code(caught.value) == code

import pytest
import torch

from lme_parallel.launch import Launch, detect, process_group

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "host"}
SLURM = {
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[003-010,12],cpu1",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("single", 0, 1, 0, None, 29500)),
        ({**TORCHRUN, "MASTER_PORT": "1234"}, ("torchrun", 3, 8, 1, "host", 1234)),
        # One process needs no group, whoever started it.
        ({"RANK": "0", "WORLD_SIZE": "1"}, ("single", 0, 1, 0, None, 29500)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "MASTER_ADDR": "h",
            },
            ("Open MPI", 1, 2, 1, "h", 29500),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, ("MPI", 1, 2, 0, None, 29500)),
        (SLURM, ("Slurm", 2, 4, 0, "gpu003", 29500)),
        (
            {
                "PET_NODE_RANK": "1",
                "PET_NNODES": "2",
                "PET_MASTER_ADDR": "p",
                "PET_MASTER_PORT": "9",
            },
            ("Kubernetes", 1, 2, 0, "p", 9),
        ),
        # The operator numbers pods as torchrun numbers processes, and counts those there will be.
        (
            {"RANK": "1", "WORLD_SIZE": "8", "PET_NODE_RANK": "1", "PET_NNODES": "2"},
            ("Kubernetes", 1, 2, 0, None, 29500),
        ),
        # torchrun in a pod.
        (
            {**TORCHRUN, "PET_NODE_RANK": "1", "PET_NNODES": "2"},
            ("torchrun", 3, 8, 1, "host", 29500),
        ),
        (
            {"JOB_COMPLETION_INDEX": "2", "NNODES": "3", "MASTER_ADDR": "job-0"},
            ("Kubernetes job", 2, 3, 0, "job-0", 29500),
        ),
        # torchrun inside a Slurm job.
        ({**SLURM, **TORCHRUN}, ("torchrun", 3, 8, 1, "host", 29500)),
        # The batch script of a Slurm job is no step.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, ("single", 0, 1, 0, None, 29500)),
    ],
    ids=[
        "none",
        "torchrun",
        "one",
        "Open MPI",
        "MPI",
        "Slurm",
        "Kubernetes",
        "Kubernetes with ranks",
        "torchrun in Kubernetes",
        "Kubernetes job",
        "torchrun in Slurm",
        "batch script",
    ],
)
def test_the_process_is_found_from_its_variables(environment, expected):
    found = detect(environment)
    assert (
        found.source,
        found.rank,
        found.world_size,
        found.local_rank,
        found.address,
        found.port,
    ) == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "two", "RANK": "0"}, "`WORLD_SIZE` must be a whole number, got 'two'"),
        ({"WORLD_SIZE": "2"}, "`RANK` is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "`RANK` must be from 0 to 1.*got 2"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "`MASTER_PORT` must be a whole number"),
    ],
)
def test_wrong_variables_are_named(environment, words):
    with pytest.raises(ValueError, match=words):
        detect(environment)


def test_one_process_joins_no_group():
    with process_group(detect({}), device=torch.device("cpu")):
        assert not torch.distributed.is_initialized()


def test_an_unknown_address_is_an_error_at_once():
    launch = detect({"PMI_RANK": "1", "PMI_SIZE": "2"})
    with (
        pytest.raises(ValueError, match="`MASTER_ADDR` is not set"),
        process_group(launch, device=torch.device("cpu")),
    ):
        pass


def test_more_processes_than_devices_are_refused(monkeypatch):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    launch = Launch(source="torchrun", rank=2, world_size=4, local_rank=2, address="h", port=1)
    with pytest.raises(ValueError, match="at most 2 processes a host"):
        launch.device()


def test_a_task_that_sees_its_own_device_only_takes_it(monkeypatch):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    task = Launch(source="Slurm", rank=2, world_size=4, local_rank=2, address="h", port=1)
    assert task.device() == torch.device("cuda", 0)

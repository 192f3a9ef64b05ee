import dataclasses

import pytest

from lme_parallel.args import DistributedArgs, GradientCheckpointingArgs, ZeroTopologyArgs
from lme_parallel.checkpoint.args import LoadArgs, SaveArgs


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"stage": 0, "torch_compile": True, "fsdp_algorithm": None},
        {"fsdp_algorithm": 1},
        {
            "stage": 0,
            "zero_topology": ZeroTopologyArgs(
                data_parallel_replication_world_size=64, data_parallel_sharding_world_size=1
            ),
        },
        {
            "tensor_parallel_world_size": 4,
            "sequence_parallel": True,
            "use_async_tensor_parallel": True,
        },
        {
            "pipeline_parallel_world_size": 2,
            "num_pipeline_stages": 4,
            "pipeline_parallel_schedule": "1F1B",
        },
        {
            "gradient_checkpointing_method": "full",
            "gradient_checkpointing_args": GradientCheckpointingArgs(
                checkpoint_every_n_layers=2, block_name="Block"
            ),
        },
    ],
    ids=str,
)
def test_layouts_that_run_files_use_are_accepted(values):
    args = DistributedArgs(**values)
    assert {name: getattr(args, name) for name in values} == values


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tensor_parallel_world_size": 0}, "`tensor_parallel_world_size` must be at least 1"),
        ({"timeout_minutes": 0}, "`timeout_minutes` must be at least 1, got 0"),
        (
            {
                "stage": 0,
                "zero_topology": ZeroTopologyArgs(
                    data_parallel_replication_world_size=1, data_parallel_sharding_world_size=2
                ),
            },
            "`data_parallel_sharding_world_size` must be 1 or absent, got 2",
        ),
        ({"cpu_offload": True, "fsdp_algorithm": None}, "`cpu_offload: true` needs"),
        ({"tensor_parallel_world_size": 2, "fsdp_algorithm": 1}, "use `fsdp_algorithm: 2`"),
        ({"sequence_parallel": True}, "`tensor_parallel_world_size` of at least 2, got 1"),
        (
            {"tensor_parallel_world_size": 2, "use_async_tensor_parallel": True},
            "needs `sequence_parallel: true`",
        ),
        ({"pipeline_parallel_world_size": 2}, "must be a multiple of.*\\(2\\), got 1"),
        ({"num_pipeline_stages": 2}, "needs a `pipeline_parallel_schedule`"),
        (
            {
                "pipeline_parallel_world_size": 2,
                "num_pipeline_stages": 2,
                "pipeline_parallel_schedule": "GPipe",
                "fsdp_algorithm": 1,
            },
            "use `fsdp_algorithm: 2`",
        ),
    ],
    ids=str,
)
def test_contradictions_are_named(values, words):
    with pytest.raises(ValueError, match=words):
        DistributedArgs(**values)


def test_half_a_zero_topology_names_the_other_half():
    with pytest.raises(ValueError, match="`data_parallel_sharding_world_size` is missing"):
        ZeroTopologyArgs(data_parallel_replication_world_size=2)


@pytest.mark.parametrize("name", ["checkpoint_every_n_layers", "num_blocks"])
def test_gradient_checkpointing_counts_from_one(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        GradientCheckpointingArgs(**{name: 0})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"save_path": "", "save_interval": 1}, "`save_path` must name a directory"),
        ({"save_path": "a", "save_interval": 0}, "`save_interval` must be at least 1, got 0"),
        ({"save_path": "a", "save_interval": 1, "keep_last": 0}, "`keep_last` must be at least 1"),
        ({"save_path": "a", "save_interval": 1, "keep_every": 5}, "no effect without `keep_last`"),
    ],
)
def test_save_args_are_checked(values, words):
    with pytest.raises(ValueError, match=words):
        SaveArgs(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"load_path": ""}, "`load_path` must name a directory"),
        ({"load_path": "a", "iteration": -1}, "`iteration` must be at least 0, got -1"),
        ({"load_path": "a", "load_optimizer": False}, "also needs `load_lr_scheduler: false`"),
        (
            {"load_path": "a", "resume_learning_rate": False},
            "also needs `load_lr_scheduler: false`",
        ),
    ],
)
def test_load_args_are_checked(values, words):
    with pytest.raises(ValueError, match=words):
        LoadArgs(**values)


@pytest.mark.parametrize("kind", [DistributedArgs, SaveArgs, LoadArgs])
def test_sections_are_frozen(kind):
    required = {"save_path": "a", "save_interval": 1, "load_path": "a"}
    names = {each.name for each in dataclasses.fields(kind)}
    section = kind(**{name: value for name, value in required.items() if name in names})
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(section, next(iter(names)), 1)

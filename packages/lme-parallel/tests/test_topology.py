import pytest
from hypothesis import given
from hypothesis import strategies as st

from lme_parallel.args import DistributedArgs, ZeroTopologyArgs
from lme_parallel.topology import Topology


@st.composite
def layouts(draw):
    sizes = st.integers(1, 3)
    tensor, pipeline, context, data = (draw(sizes) for _ in range(4))
    stages = pipeline * draw(st.integers(1, 2))
    stage = draw(st.sampled_from([0, 1, 2, 3]))
    inner = data * context
    shard = (
        1
        if stage == 0
        else draw(st.sampled_from([n for n in range(1, inner + 1) if not inner % n]))
    )
    args = DistributedArgs(
        stage=stage,
        tensor_parallel_world_size=tensor,
        pipeline_parallel_world_size=pipeline,
        num_pipeline_stages=stages,
        pipeline_parallel_schedule="1F1B" if stages > 1 else None,
        context_parallel_world_size=context,
        expert_parallel_world_size=draw(
            st.sampled_from(
                [n for n in range(1, inner + 1) if not inner % n and not (shard % n and n % shard)]
            )
        ),
        zero_topology=ZeroTopologyArgs(
            data_parallel_replication_world_size=inner // shard,
            data_parallel_sharding_world_size=shard,
        ),
    )
    return args, tensor * pipeline * inner


def coordinates(topology, *axes):
    return tuple(topology.coordinates[each] for each in axes)


@given(layouts())
def test_every_rank_has_one_place_and_every_place_one_rank(layout):
    args, world = layout
    ranks = [Topology.from_args(args, world, rank) for rank in range(world)]
    dense = [coordinates(each, "pipeline", "replicate", "shard", "tensor") for each in ranks]
    sparse = [coordinates(each, "pipeline", "data", "context", "tensor") for each in ranks]
    assert len(set(dense)) == len(set(sparse)) == world
    # Those that have the same experts share and copy them.
    experts = [coordinates(each, "pipeline", "expert", "tensor") for each in ranks]
    first = ranks[0]
    assert {experts.count(each) for each in experts} == {
        first.expert_replicate * first.expert_shard
    }
    # Slowest axis first, so that neighbours share a tensor group.
    assert dense == sorted(dense)
    assert sparse == sorted(sparse)
    assert first.pipeline * first.replicate * first.shard * first.tensor == world
    assert first.data_world_size * first.context == first.replicate * first.shard
    assert all(each.describe() == first.describe() for each in ranks)


@given(layouts())
def test_ranks_that_split_one_batch_read_the_same_rows(layout):
    args, world = layout
    readers = {}
    for rank in range(world):
        each = Topology.from_args(args, world, rank)
        assert 0 <= each.data_rank < each.data_world_size
        readers.setdefault(each.data_rank, set()).add(rank)
    same = world // len(readers)
    assert {len(ranks) for ranks in readers.values()} == {same}
    assert (
        same
        == args.tensor_parallel_world_size
        * args.pipeline_parallel_world_size
        * args.context_parallel_world_size
    )


def test_ranks_are_numbered_as_run_files_expect():
    args = DistributedArgs(
        tensor_parallel_world_size=2,
        zero_topology=ZeroTopologyArgs(
            data_parallel_replication_world_size=2, data_parallel_sharding_world_size=2
        ),
    )
    found = [Topology.from_args(args, 8, rank).coordinates for rank in range(8)]
    assert [each["tensor"] for each in found] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [each["shard"] for each in found] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [each["replicate"] for each in found] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [each["data"] for each in found] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_by_default_all_ranks_share_one_copy_and_stage_0_replicates():
    sharded = Topology.from_args(DistributedArgs(), 6, 0)
    whole = Topology.from_args(DistributedArgs(stage=0), 6, 0)
    assert (sharded.replicate, sharded.shard) == (1, 6)
    assert (whole.replicate, whole.shard) == (6, 1)
    assert Topology.from_args(DistributedArgs(fsdp_algorithm=None), 1, 0).is_single


@pytest.mark.parametrize(
    ("values", "world", "words"),
    [
        (
            {"tensor_parallel_world_size": 4},
            6,
            r"multiple of 4 processes, `tensor_parallel_world_size` \(4\), but there are 6; start 4",
        ),
        (
            {"tensor_parallel_world_size": 2, "context_parallel_world_size": 2},
            1,
            r"multiple of 4.*`context_parallel_world_size` \(2\) \* `tensor_parallel_world_size` \(2\)",
        ),
        (
            {
                "zero_topology": ZeroTopologyArgs(
                    data_parallel_replication_world_size=8, data_parallel_sharding_world_size=8
                )
            },
            1,
            r"`data_parallel_replication_world_size` \(8\) times.*ranks, 1; change them or leave",
        ),
        ({"expert_parallel_world_size": 3}, 4, "`expert_parallel_world_size` must divide the 4"),
        (
            {
                "expert_parallel_world_size": 3,
                "zero_topology": ZeroTopologyArgs(
                    data_parallel_replication_world_size=3, data_parallel_sharding_world_size=2
                ),
            },
            6,
            r"`expert_parallel_world_size` \(3\) must divide `data_parallel_sharding",
        ),
        ({"fsdp_algorithm": None}, 2, "`fsdp_algorithm: null` shards nothing, but `stage: 3`"),
    ],
)
def test_layouts_that_do_not_fit_name_the_setting(values, world, words):
    with pytest.raises(ValueError, match=words):
        Topology.from_args(DistributedArgs(**values), world, 0)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank must be from 0 to 1, got {rank}"):
        Topology.from_args(DistributedArgs(), 2, rank)

"""Plans: which rows and columns each process holds, and what is refused by name."""

from math import prod

import pytest
import torch
from torch import nn

from lme_parallel.args import DistributedArgs
from lme_parallel.parallelize import parallelize
from lme_parallel.shards import Box, Shard
from lme_parallel.tensor.cut import Cut, even_runs
from lme_parallel.tensor.placement import CutValues
from lme_parallel.tensor.plan import read_plan, vocabulary_rows
from lme_parallel.tiny import HIDDEN, INTERMEDIATE, VOCABULARY, TinyModel
from lme_parallel.tiny_run import InitialValues
from lme_parallel.topology import Topology


def tiny(**options):
    with torch.device("meta"):
        return TinyModel(**options)


def test_the_parts_of_all_processes_are_the_whole():
    model = tiny()
    plans = [read_plan(model, 4, rank, sequence_parallel=False) for rank in range(4)]
    for name in plans[0].cuts:
        whole = torch.zeros(model.get_parameter(name).shape)
        for plan in plans:
            for region in plan.cuts[name].regions:
                whole[region] += 1
        assert torch.equal(whole, torch.ones_like(whole)), name


def test_rows_and_columns_are_those_the_modules_name():
    plan = read_plan(tiny(), 2, 1, sequence_parallel=False)
    found = {name: (cut.dim, *cut.runs) for name, cut in plan.cuts.items()}
    block = {
        "sequence_mixer.qkv.weight": (0, (3 * HIDDEN // 2, 3 * HIDDEN)),
        "sequence_mixer.qkv.bias": (0, (3 * HIDDEN // 2, 3 * HIDDEN)),
        "sequence_mixer.output.weight": (1, (HIDDEN // 2, HIDDEN)),
        "mlp.gate_up.weight": (0, (INTERMEDIATE, 2 * INTERMEDIATE)),
        "mlp.down.weight": (1, (INTERMEDIATE // 2, INTERMEDIATE)),
    }
    expected = {f"blocks.{i}.{name}": cut for i in range(2) for name, cut in block.items()}
    vocabulary = (0, (10, VOCABULARY))
    assert found == expected | {"embedding.weight": vocabulary, "lm_head.weight": vocabulary}


@pytest.mark.parametrize("cut", [False, True], ids=["rows whole", "rows cut"])
def test_shares_of_gradients_are_where_work_is_cut(cut):
    plan = read_plan(tiny(layers=1), 2, 0, sequence_parallel=cut)
    inside = {"blocks.0.sequence_mixer.query_scale.weight", "final_norm.weight", "final_norm.bias"}
    norms = {f"blocks.0.{n}_norm.{p}" for n in ("mixer", "mlp") for p in ("weight", "bias")}
    assert plan.partial == (inside | norms if cut else inside)


@pytest.mark.parametrize(
    ("V", "size", "rows"),
    # Multiples of 64 where every process gets some; else as even as can be.
    [(50257, 2, 25152), (50257, 8, 6336), (128256, 8, 16064), (19, 4, 5), (100, 2, 64), (4, 4, 1)],
)
def test_rows_of_a_vocabulary(V, size, rows):
    assert vocabulary_rows(V, size) == rows
    assert rows * (size - 1) < V <= rows * size


class Sectioned(nn.Module):
    shard_plan = {"rows": "column", "heads": "heads", "odd": "heads"}  # noqa: RUF012 (as a module has it)
    shard_or_whole = True

    def __init__(self, units=4):
        super().__init__()
        self.rows = nn.Linear(3, 14)
        self.heads = nn.Parameter(torch.empty(6, 2))
        self.odd = nn.Parameter(torch.empty(5, 2))
        self.shard_sections = {"rows": [4, 8, 2], "heads": [2, 4], "odd": [4, 1]}
        self.shard_units = {"units": units}


def test_each_section_of_rows_is_cut_and_heads_that_do_not_divide_are_whole():
    plan = read_plan(replaced(Sectioned()), 2, 1, sequence_parallel=False)
    path = "blocks.1.sequence_mixer."
    found = {name: cut.runs for name, cut in plan.cuts.items() if name.startswith(path)}
    rows = ((2, 4), (8, 12), (13, 14))
    expected = {"rows.weight": rows, "rows.bias": rows, "heads": ((1, 2), (4, 6))}
    assert found == {path + name: runs for name, runs in expected.items()}
    assert path + "odd" in plan.partial
    assert path + "heads" not in plan.partial


@pytest.mark.parametrize("rank", [0, 1])
def test_values_and_places_of_sections_are_those_of_the_whole(rank):
    whole = torch.arange(42.0).view(14, 3)
    cut = Cut((14, 3), 0, even_runs([4, 8, 2], 2, rank))
    local = cut.take(whole)
    assert torch.equal(local, torch.cat([whole[region] for region in cut.regions]))
    values = CutValues(lambda name, region: whole[region], {"rows": cut})
    assert torch.equal(values("rows", None), local)
    # A data-parallel process has some rows of what is here.
    part = (slice(1, 5), slice(0, 3))
    assert torch.equal(values("rows", part), local[part])
    shard = Shard(cut.shape, tuple(cut.boxes(Box(part, 0))), True)
    for region, view in shard.views(local[part].contiguous()):
        assert torch.equal(view, whole[region])
    assert sum(prod(box.shape) for box in shard.boxes) == 12


def test_what_does_not_divide_stays_whole_where_a_module_allows_it(caplog):
    plan = read_plan(replaced(Sectioned(units=3)), 2, 0, sequence_parallel=False)
    assert not [name for name in plan.cuts if name.startswith("blocks.1.sequence_mixer.")]
    (record,) = caplog.records
    assert "`units` of Sectioned (`blocks.1.sequence_mixer`) is 3" in record.getMessage()


def test_sections_must_be_all_rows():
    mixer = Sectioned()
    mixer.shard_sections["rows"] = [4, 8]
    with pytest.raises(ValueError, match=r"`shard_sections` of `blocks.1.*14 rows, got \(4, 8\)"):
        read_plan(replaced(mixer), 2, 0, sequence_parallel=False)


class Unsaid(nn.Module):
    shard_plan = None


class Odd(nn.Module):
    shard_plan = {"first": "column"}  # noqa: RUF012 (as a module has it)

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)


class Diagonal(Odd):
    shard_plan = {"first": "diagonal"}  # noqa: RUF012 (as above)


def replaced(mixer):
    model = tiny()
    model.blocks["1"].sequence_mixer = mixer
    return model


@pytest.mark.parametrize(
    ("model", "size", "words"),
    [
        (tiny, 8, r"`heads` of Attention \(`blocks.0.sequence_mixer`\) must be a multiple of"),
        (lambda: replaced(Unsaid()), 2, r"Unsaid \(`blocks.1.sequence_mixer`\).*is None"),
        (lambda: replaced(Odd()), 4, r"dim 0 of `blocks.1.sequence_mixer.first.weight`, 6"),
        (lambda: replaced(Diagonal()), 2, "must be one of column, row.*got 'diagonal'"),
    ],
)
def test_what_cannot_be_cut_is_named_before_any_process_is_spoken_to(model, size, words):
    model, args = model(), DistributedArgs(tensor_parallel_world_size=size)
    # There is no process group here.
    with pytest.raises(ValueError, match=words):
        parallelize(
            model,
            Topology.from_args(args, size, 0),
            args,
            device=torch.device("cpu"),
            dtype=torch.float32,
            initial_value=InitialValues({}),
        )


def test_a_vocabulary_smaller_than_the_group_is_named():
    with pytest.raises(ValueError, match=r"`vocab_size` \(3\) is too small.*\(4\)"):
        vocabulary_rows(3, 4)


def test_asynchronous_products_need_devices_that_can():
    args = DistributedArgs(
        tensor_parallel_world_size=2, sequence_parallel=True, use_async_tensor_parallel=True
    )
    with pytest.raises(ValueError, match=r"`use_async_tensor_parallel: true` needs CUDA.*got cpu"):
        parallelize(
            tiny(),
            Topology.from_args(args, 2, 0),
            args,
            device=torch.device("cpu"),
            dtype=torch.float32,
            initial_value=InitialValues({}),
        )

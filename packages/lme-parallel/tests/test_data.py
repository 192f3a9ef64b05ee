"""What each stage promises: bytes in each process, whose first values are asked for."""

import logging
from math import prod

import pytest
import torch
from torch.optim import AdamW

from lme_parallel.args import DistributedArgs
from lme_parallel.data import syncs_every_step
from lme_parallel.equality import rank_batches, tiny_runtime
from lme_parallel.testing import run_distributed
from lme_parallel.tiny import TinyModel
from lme_parallel.tiny_run import InitialValues, TinyObjective, global_batches

STAGES = {
    "stage 0": {"stage": 0},
    "DDP": {"stage": 0, "fsdp_algorithm": None},
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "FSDP 1": {"stage": 3, "fsdp_algorithm": 1},
}
CUT = ("stage 1", "stage 2", "stage 3")
"""Stages that cut each matrix; FSDP 1 cuts what many parameters are together."""
WORLD_SIZE = 4
# The largest shard of a dim is rounded up: 19 rows are 5, 5, 5 and 4.
SHARE = (0.2, 0.35)
WHOLE = (1.0, 1.0)
# Parameters inside the step, gradients inside the step, optimizer state; of the whole model's.
PROMISES = {
    "stage 0": (WHOLE, WHOLE, WHOLE),
    "DDP": (WHOLE, WHOLE, WHOLE),
    "stage 1": (WHOLE, WHOLE, SHARE),
    "stage 2": (WHOLE, SHARE, SHARE),
    "stage 3": (SHARE, SHARE, SHARE),
    "FSDP 1": (SHARE, SHARE, SHARE),
}


class Watching(TinyObjective):
    """Counts what a process holds when the second micro batch begins."""

    def __init__(self, runtime):
        self.runtime = runtime
        self.seen = []

    def forward(self, model, batch):
        blocks = self.runtime.model.blocks
        parameters = list(blocks.parameters())
        self.seen.append(
            [
                sum(local(each).numel() for each in parameters),
                gradient_elements(self.runtime, blocks),
            ]
        )
        return super().forward(model, batch)


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gradient_elements(runtime, blocks):
    """Elements of gradients anywhere: on parameters, in buckets, in what is not reduced yet."""
    buckets = getattr(runtime._placement, "_buckets", None)
    if buckets is not None:
        return sum(
            view.numel()
            for bucket in buckets
            for name, view in bucket.views.items()
            if name.startswith("blocks.")
        )
    found = {}
    for module in blocks.modules():
        if hasattr(module, "_get_fsdp_state"):
            state = module._get_fsdp_state()
            # Before torch 2.15 a module has one group.
            groups = getattr(state, "_fsdp_param_groups", None)
            for group in [state._fsdp_param_group] if groups is None else groups:
                for each in group.fsdp_params:
                    unsharded = getattr(each, "_unsharded_param", None)
                    for grad in (
                        each.sharded_param.grad,
                        getattr(each, "unsharded_accumulated_grad", None),
                        None if unsharded is None else unsharded.grad,
                    ):
                        if grad is not None:
                            found[id(grad)] = local(grad).numel()
    if not found:
        named = runtime.named_parameters().items()
        return sum(
            p.grad.numel() for n, p in named if n.startswith("blocks.") and p.grad is not None
        )
    return sum(found.values())


def hold(settings):
    values = InitialValues(TinyModel().shapes)
    runtime, topology = tiny_runtime(settings, "torch.float32", {}, values)
    optimizer = AdamW(runtime.named_parameters().values())
    objective = Watching(runtime)
    runtime.forward_backward(objective, rank_batches(topology, 0, 2))
    optimizer.step()
    state = sum(
        each.numel()
        for name, parameter in runtime.named_parameters().items()
        for each in optimizer.state[parameter].values()
        if name.startswith("blocks.") and each.numel() > 1
    )
    return [*objective.seen[1], state, values.elements]


@pytest.fixture(scope="module")
def expected():
    """Elements of the blocks' parameters, and of the whole model's."""
    model = TinyModel()
    return sum(each.numel() for each in model.blocks.parameters())


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_keeps_its_promise_inside_a_step(name, expected):
    ranks = run_distributed(hold, WORLD_SIZE, STAGES[name])
    shapes = {n: each for n, each in TinyModel().shapes.items() if not n.endswith(".seen")}
    for parameters, gradients, state, asked in ranks:
        counted = (parameters, gradients, state / 2)
        for share, (low, high) in zip(counted, PROMISES[name], strict=True):
            assert low <= share / expected <= high, counted
        if name in CUT:
            # A matrix is never asked for, or made, whole.
            for matrix in (each for each in shapes if prod(shapes[each]) >= 64):
                assert asked.get(matrix, 0) <= SHARE[1] * prod(shapes[matrix])
    total = sum(asked.get(each, 0) for *_, asked in ranks for each in shapes)
    copies = WORLD_SIZE if name in ("DDP", "stage 0") else 1
    assert total == copies * sum(prod(shape) for shape in shapes.values())


def test_gradients_are_summed_as_the_stage_promises(caplog):
    assert [syncs_every_step(DistributedArgs(stage=each)) for each in (0, 1, 2, 3)] == [
        False,
        False,
        True,
        True,
    ]
    with caplog.at_level(logging.WARNING):
        args = DistributedArgs(stage=3, sync_every_gradient_accumulation_step=False)
        assert not syncs_every_step(args)
    assert "keeps whole gradients in each process" in caplog.text
    assert syncs_every_step(DistributedArgs(stage=1, sync_every_gradient_accumulation_step=True))


def changed_between(settings):
    """Change weights without a pass, as a restored checkpoint does; evaluate before and after."""
    runtime, topology = tiny_runtime(settings, "torch.float64", {})
    batch = rank_batches(topology, 0, 1)[0]
    before = runtime.forward(TinyObjective(), batch).total
    with torch.no_grad():
        for each in runtime.named_parameters().values():
            each.mul_(0.5)
    runtime.finish_step()
    return [before, runtime.forward(TinyObjective(), batch).total]


@pytest.mark.parametrize("name", [name for name in STAGES if name != "stage 0"])
def test_changed_weights_are_used_after_finish_step(name):
    found = run_distributed(changed_between, 2, STAGES[name])
    runtime, _ = tiny_runtime({}, "torch.float64", {})
    expected = sum(runtime.forward(TinyObjective(), each).total for each in global_batches(0, 2))
    with torch.no_grad():
        for each in runtime.named_parameters().values():
            each.mul_(0.5)
    changed = sum(runtime.forward(TinyObjective(), each).total for each in global_batches(0, 2))
    for before, after in found:
        torch.testing.assert_close(before, expected)
        torch.testing.assert_close(after, changed)


def refuse_a_norm_that_is_not_finite(settings):
    runtime, topology = tiny_runtime(settings, "torch.float32", {})
    runtime.forward_backward(TinyObjective(), rank_batches(topology, 0, 1))
    if topology.rank == 1:
        name = "blocks.0.sequence_mixer.output.weight"
        runtime.named_parameters()[name].grad.view(-1)[:1] = float("inf")
    return bool(torch.isfinite(runtime.clip_gradients(1.0)))


def test_an_overflow_in_one_process_is_seen_by_all():
    assert run_distributed(refuse_a_norm_that_is_not_finite, 2, {"stage": 3}) == [False, False]

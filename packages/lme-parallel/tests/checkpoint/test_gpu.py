from dataclasses import dataclass

import pytest
import torch

from lme_parallel.args import DistributedArgs
from lme_parallel.checkpoint.args import SaveArgs
from lme_parallel.checkpoint.checkpointer import Checkpointer
from lme_parallel.topology import Topology

pytestmark = pytest.mark.gpu


@dataclass
class State:
    step: int = 0
    tokens: int = 0


def build(folder, seed, **args):
    torch.manual_seed(seed)
    model = torch.nn.Linear(300, 200, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=args.pop("fused"))
    checkpointer = Checkpointer(
        SaveArgs(save_path=str(folder), save_interval=1, **args),
        parameters=dict(model.named_parameters()),
        buffers={},
        optimizer=optimizer,
        stateful={},
        documents={},
        topology=Topology.from_args(DistributedArgs(), 1, 0),
    )
    return model, optimizer, checkpointer


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_run_on_the_gpu_is_restored_bit_for_bit(is_async, fused, tmp_path):
    model, optimizer, checkpointer = build(tmp_path, 0, fused=fused, async_checkpointing=is_async)

    def step(model, optimizer):
        model(torch.ones(4, 300, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer)
    checkpointer.save(State(step=1))
    saved = [each.detach().clone() for each in model.parameters()]
    # An asynchronous save holds the values of its moment.
    step(model, optimizer)
    checkpointer.wait()

    other, other_optimizer, other_checkpointer = build(tmp_path, 1, fused=fused)
    assert other_checkpointer.restore(State()) == 1
    for parameter, expected in zip(other.parameters(), saved, strict=True):
        assert torch.equal(parameter, expected)
        state = other_optimizer.state[parameter]
        assert state["exp_avg"].device == parameter.device
        assert state["step"].device.type == ("cuda" if fused else "cpu")
    step(other, other_optimizer)
    for left, right in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(left, right)

"""On a GPU: no step waits for the device, and the numbers are those of the CPU."""

import copy

import pytest
import torch

from lme_core.training.batches import BatchStream
from lme_core.training.objectives import NextToken
from lme_core.training.optimizer_class_args import AdamWClassArgs
from lme_core.training.optimizers import TorchAdamWArgs, build_optimizer
from lme_core.training.runtime import SingleDevice
from lme_core.training.schedules import LRSchedulerArgs, build_schedule
from lme_core.training.trainer import Trainer, TrainState

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def build(model, loader, traits, device, dtype, hooks=(), steps=6):
    runtime = SingleDevice(model, device=device, dtype=dtype)
    named = runtime.named_parameters()
    args = TorchAdamWArgs(class_args=AdamWClassArgs(lr=1e-2))
    optimizer = build_optimizer(args, named, traits(named))
    schedule = build_schedule(LRSchedulerArgs(num_warmup_steps=2), optimizer, steps)
    stream = BatchStream(loader, gradient_accumulation_steps=2, device=device)
    trainer = Trainer(
        runtime, NextToken(), optimizer, schedule, stream, hooks, num_training_steps=steps
    )
    return trainer, runtime, optimizer


@DTYPES
def test_no_step_waits_for_the_device(dtype, tiny_model, counting_loader, tiny_traits):
    def strict(state, report):
        # The first step allocates and loads kernels.
        torch.cuda.set_sync_debug_mode("error")

    loader = counting_loader(ragged=True)
    trainer, _, _ = build(tiny_model(), loader, tiny_traits, "cuda", dtype, [strict])
    state = TrainState()
    try:
        trainer.fit(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.step == 6


@DTYPES
def test_losses_and_norms_are_those_of_the_cpu(dtype, tiny_model, counting_loader, tiny_traits):
    curves = {}
    for device in ("cpu", "cuda"):
        seen = curves.setdefault(device, [])
        trainer, _, _ = build(
            copy.deepcopy(tiny_model()),
            counting_loader(ragged=True),
            tiny_traits,
            device,
            dtype,
            [lambda state, report, seen=seen: seen.append((report.loss, report.grad_norm))],
        )
        trainer.fit(TrainState())
    # fp32 sums in another order; the 16-bit types round after every product.
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    for ours, theirs in zip(curves["cuda"], curves["cpu"], strict=True):
        assert ours[0].item() == pytest.approx(theirs[0].item(), rel=bound)
        assert ours[1].item() == pytest.approx(theirs[1].item(), rel=4 * bound)


def test_an_overflow_is_skipped_on_the_device(tiny_model, counting_loader, tiny_traits):
    loader = counting_loader()
    trainer, runtime, optimizer = build(
        tiny_model(), loader, tiny_traits, "cuda", torch.float16, steps=1
    )
    runtime.load_state_dict({"loss_scale": {"scale": 2.0**40, "good_steps": 0}})
    before = {name: p.detach().clone() for name, p in runtime.named_parameters().items()}
    norms = []
    trainer._hooks = (lambda state, report: norms.append(report.grad_norm),)
    trainer.fit(TrainState())
    assert not torch.isfinite(norms[0])
    for name, parameter in runtime.named_parameters().items():
        assert torch.equal(parameter, before[name])
        assert optimizer.state[parameter]["step"].item() == 0
    assert runtime.state_dict()["loss_scale"]["scale"] == 2.0**39

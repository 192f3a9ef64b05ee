import pytest
import torch

from lme_core.training.batches import BatchStream
from lme_core.training.objectives import NextToken
from lme_core.training.optimizer_args import TorchSGDArgs
from lme_core.training.optimizer_class_args import SGDClassArgs
from lme_core.training.optimizers import build_optimizer
from lme_core.training.runtime import SingleDevice
from lme_core.training.schedules import LRSchedulerArgs, build_schedule
from lme_core.training.trainer import Trainer, TrainState, dropout_key


class Noting:
    """A hook that notes its calls and that it was closed."""

    def __init__(self, action=None):
        self.calls, self.closed, self.action = [], False, action

    def __call__(self, state, report):
        self.calls.append((state.step, state.tokens, report))
        if self.action is not None:
            self.action(state)

    def close(self):
        self.closed = True


@pytest.fixture
def build(tiny_model, counting_loader, tiny_traits):
    def make(hooks=(), *, length=None, steps=4, clipping=None):
        runtime = SingleDevice(tiny_model())
        args = TorchSGDArgs(class_args=SGDClassArgs(lr=0.5))
        named = runtime.named_parameters()
        optimizer = build_optimizer(args, named, tiny_traits(named))
        lr_args = LRSchedulerArgs(num_warmup_steps=2, lr_decay_style="linear", lr_decay_factor=0)
        return Trainer(
            runtime,
            NextToken(),
            optimizer,
            build_schedule(lr_args, optimizer, steps),
            BatchStream(
                counting_loader(length=length), gradient_accumulation_steps=2, device="cpu"
            ),
            hooks,
            num_training_steps=steps,
            gradient_clipping=clipping,
        )

    return make


@pytest.mark.parametrize("clipping", [None, 0.25])
def test_steps_are_those_of_a_plain_torch_loop(clipping, build, tiny_model, counting_loader):
    hook = Noting()
    trainer = build([hook], clipping=clipping)
    trainer.fit(TrainState())

    model, loader = tiny_model(), counting_loader()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step, rate in enumerate([0.0, 0.25, 0.5, 0.25]):
        batches = [next(loader), next(loader)]
        optimizer.zero_grad()
        losses = []
        for batch in batches:
            # Both micro batches have as many targets: the mean of means is the mean.
            logits = model(batch, logits=True).logits.flatten(0, 1)
            losses.append(torch.nn.functional.cross_entropy(logits, batch["labels"].flatten()))
            (losses[-1] / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clipping or float("inf"))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()

        done, tokens, report = hook.calls[step]
        assert (done, tokens, report.tokens) == (step + 1, (step + 1) * 48, 48)
        assert report.learning_rate == pytest.approx(rate)
        assert report.loss.item() == pytest.approx(sum(losses).item() / 2, rel=1e-6)
        assert report.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        assert report.targets == 48
        assert report.is_last == (step == 3)
    ours = trainer._runtime.named_parameters()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-5, atol=1e-6)


def test_a_hook_ends_the_run_and_later_hooks_still_see_the_step(build):
    def stop(state):
        if state.step == 2:
            state.stop_reason = "enough"

    first, second = Noting(stop), Noting()
    state = TrainState()
    build([first, second]).fit(state)
    assert (state.step, state.stop_reason) == (2, "enough")
    assert [step for step, _, _ in second.calls] == [1, 2]
    assert not second.calls[-1][2].is_last
    assert (first.closed, second.closed) == (True, True)


def test_hooks_after_one_that_went_back_do_not_see_the_undone_step(build):
    undone = []

    def go_back(state):
        if state.step == 4 and not undone:
            undone.append(state.step)
            state.step = 2

    first, second = Noting(go_back), Noting()
    state = TrainState()
    build([first, second]).fit(state)
    assert [step for step, _, _ in first.calls] == [1, 2, 3, 4, 3, 4]
    assert [step for step, _, _ in second.calls] == [1, 2, 3, 3, 4]
    assert state.step == 4


def test_hooks_are_closed_when_one_fails(build):
    def fail(state):
        raise OSError("disk full")

    first, second = Noting(fail), Noting()
    with pytest.raises(OSError, match="disk full"):
        build([first, second]).fit(TrainState())
    assert (first.closed, second.closed) == (True, True)


def test_hooks_may_be_functions(build):
    seen = []
    build([lambda state, report: seen.append(state.step)]).fit(TrainState())
    assert seen == [1, 2, 3, 4]


def test_a_run_that_is_complete_does_nothing(build):
    hook = Noting()
    build([hook]).fit(TrainState(step=4))
    assert hook.calls == []


def test_data_that_end_too_early_are_an_error_that_names_the_step(build):
    with pytest.raises(ValueError, match="ended after 2 of 4 steps"):
        build(length=5).fit(TrainState())


def test_dropout_keys_differ_by_seed_and_step_and_repeat():
    keys = [dropout_key(seed, step, torch.device("cpu")) for seed in (1, 2) for step in (0, 1, 2)]
    assert len({key.item() for key in keys}) == 6
    assert dropout_key(1, 2, torch.device("cpu")) == keys[2]
    assert keys[0].dtype == torch.int64

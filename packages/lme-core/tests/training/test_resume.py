"""A run that is cut and resumed is the run that was not cut."""

import json
import os
import signal

import pytest
import torch

from lme_core.training.batches import BatchStream, FixedBatches
from lme_core.training.evaluation import EvaluationSet
from lme_core.training.hooks import EvaluateHook, LogHook, SaveHook, StopHook
from lme_core.training.json_lines import JsonLines
from lme_core.training.objectives import NextToken
from lme_core.training.optimizer_args import TorchSGDArgs
from lme_core.training.optimizer_class_args import AdamWClassArgs, SGDClassArgs
from lme_core.training.optimizers import TorchAdamWArgs, build_optimizer
from lme_core.training.runtime import SingleDevice
from lme_core.training.schedules import LRSchedulerArgs, build_schedule
from lme_core.training.throughput import Throughput
from lme_core.training.tracking import Trackers
from lme_core.training.trainer import Trainer, TrainState

STEPS = 12
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


class KilledError(Exception):
    pass


class MemorySaver:
    """Keeps the newest checkpoint as plain tensors and JSON."""

    def __init__(self, run, shelf):
        self.run, self.shelf = run, shelf

    def save(self, state):
        run = self.run
        tensors = {**run.runtime.named_parameters(), **run.runtime.named_buffers()}
        self.shelf["checkpoint"] = {
            "tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()},
            "optimizer": run.optimizer_tensors(),
            "json": json.dumps(
                {
                    "step": state.step,
                    "tokens": state.tokens,
                    **{name: each.state_dict() for name, each in run.stateful.items()},
                }
            ),
        }

    def restore(self, state):
        if "checkpoint" not in self.shelf:
            return
        run, checkpoint = self.run, self.shelf["checkpoint"]
        saved = json.loads(checkpoint["json"])
        state.step, state.tokens = saved["step"], saved["tokens"]
        for name, each in run.stateful.items():
            each.load_state_dict(saved[name])
        tensors = {**run.runtime.named_parameters(), **run.runtime.named_buffers()}
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(checkpoint["tensors"][name])
        for name, parameter in run.runtime.named_parameters().items():
            entries = checkpoint["optimizer"].items()
            run.optimizer.state[parameter] = {
                key: value.clone() for (owner, key), value in entries if owner == name
            }

    def wait(self):
        pass


class Run:
    """Everything of one process, built anew as a new process would."""

    def __init__(self, factories, folder, shelf, *, dtype, args, evaluation=True, extra=()):
        tiny_model, counting_loader, tiny_traits = factories
        # Other initial values than a restored run has.
        model = tiny_model(dropout=True, auxiliary=True, seed=len(shelf))
        self.runtime = SingleDevice(model, dtype=dtype)
        named = self.runtime.named_parameters()
        self.optimizer = build_optimizer(args, named, tiny_traits(named))
        lr_args = LRSchedulerArgs(num_warmup_steps=3)
        schedule = build_schedule(lr_args, self.optimizer, STEPS)
        stream = BatchStream(
            counting_loader(ragged=True), gradient_accumulation_steps=2, device="cpu"
        )
        self.path = folder / "metrics.jsonl"
        tracker = Trackers({"metrics": JsonLines(self.path)})
        throughput = Throughput(cost_per_accelerator_per_hour=2.0)
        objective = NextToken({"aux_loss": 0.01})
        self.stateful = {
            "schedule": schedule,
            "batches": stream,
            "runtime": self.runtime,
            "tracker": tracker,
            "throughput": throughput,
        }
        saver = MemorySaver(self, shelf)
        held_out = FixedBatches(counting_loader(batch_size=3), 2)
        sets = [
            EvaluationSet(context="val", group="held out", batches=held_out, bytes_per_target=3.5),
            EvaluationSet(context="test", batches=held_out),
        ]
        hooks = [
            *extra,
            StopHook(self.runtime),
            LogHook(self.runtime, tracker, throughput, interval=1),
            EvaluateHook(self.runtime, objective, tracker, sets, interval=3),
            SaveHook(saver, tracker, interval=4),
        ]
        if not evaluation:
            hooks = [each for each in hooks if not isinstance(each, EvaluateHook)]
        self.trainer = Trainer(
            self.runtime,
            objective,
            self.optimizer,
            schedule,
            stream,
            hooks,
            num_training_steps=STEPS,
            gradient_clipping=0.5,
        )
        self.state = TrainState()
        saver.restore(self.state)
        tracker.start(self.state.step)

    def optimizer_tensors(self):
        return {
            (name, key): value.detach().clone()
            for name, parameter in self.runtime.named_parameters().items()
            for key, value in self.optimizer.state[parameter].items()
            if torch.is_tensor(value)
        }

    def lines(self):
        """What must be equal: all but times, rates, money and memory."""
        left_out = {"tokens_per_second", "tflops_per_device", "mfu", "cost_usd"}
        kept = []
        for line in self.path.read_text().splitlines():
            record = json.loads(line)
            kept.append(
                {
                    name: value
                    for name, value in record.items()
                    if name not in left_out
                    and not name.endswith("_seconds")
                    and not name.endswith("_bytes")
                }
            )
        return kept


@pytest.fixture
def factories(tiny_model, counting_loader, tiny_traits):
    return tiny_model, counting_loader, tiny_traits


def adamw():
    return TorchAdamWArgs(class_args=AdamWClassArgs(lr=3e-2))


def assert_same(run, straight):
    assert run.state == straight.state
    assert run.lines() == straight.lines()
    ours = {**run.runtime.named_parameters(), **run.runtime.named_buffers()}
    theirs = {**straight.runtime.named_parameters(), **straight.runtime.named_buffers()}
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    mine, others = run.optimizer_tensors(), straight.optimizer_tensors()
    assert mine.keys() == others.keys()
    for key, tensor in others.items():
        assert torch.equal(mine[key], tensor), key


@DTYPES
# Steps take two of an epoch's seven batches: 7 is at the end of the second epoch, 5 inside one.
# Before the first save; at a save; one after; at the end of an epoch; one before the end.
@pytest.mark.parametrize("cut", [2, 4, 5, 7, 11])
def test_a_killed_run_resumed_is_the_straight_run(dtype, cut, factories, tmp_path):
    straight = Run(factories, tmp_path / "straight", {}, dtype=dtype, args=adamw())
    straight.trainer.fit(straight.state)
    assert straight.state.step == STEPS

    def kill(state, report):
        if state.step == cut + 1:
            raise KilledError

    shelf = {}
    first = Run(factories, tmp_path / "cut", shelf, dtype=dtype, args=adamw(), extra=[kill])
    with pytest.raises(KilledError):
        first.trainer.fit(first.state)
    # The kill came in the middle of a line.
    with first.path.open("a") as file:
        file.write('{"context": "train", "step": ')
    second = Run(factories, tmp_path / "cut", shelf, dtype=dtype, args=adamw())
    # Step 2 comes before the first save.
    assert second.state.step == cut // 4 * 4
    if cut == 2:
        # Nothing to restore: the same initial values again, as a new process would make them.
        assert second.lines() == []
    second.trainer.fit(second.state)
    assert_same(second, straight)


def test_losses_fall_so_that_equality_means_something(factories, tmp_path):
    run = Run(factories, tmp_path, {}, dtype=torch.bfloat16, args=adamw())
    run.trainer.fit(run.state)
    lines = run.lines()
    train = [line for line in lines if line["context"] == "train"]
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert train[-1]["loss"] < train[0]["loss"] - 0.3
    evaluated = [(x["context"], x["step"]) for x in lines if x["context"] != "train"]
    assert evaluated == [("val", 3), ("val", 6), ("val", 9), ("val", 12), ("test", 12)]


@pytest.mark.parametrize("args", [TorchSGDArgs(class_args=SGDClassArgs(momentum=0.9, lr=0.1))])
def test_other_optimizers_resume_too(args, factories, tmp_path):
    straight = Run(factories, tmp_path / "straight", {}, dtype=torch.float32, args=args)
    straight.trainer.fit(straight.state)
    shelf = {}

    def kill(state, report):
        if state.step == 6:
            raise KilledError

    first = Run(factories, tmp_path / "cut", shelf, dtype=torch.float32, args=args, extra=[kill])
    with pytest.raises(KilledError):
        first.trainer.fit(first.state)
    second = Run(factories, tmp_path / "cut", shelf, dtype=torch.float32, args=args)
    second.trainer.fit(second.state)
    assert_same(second, straight)


def test_a_signal_ends_in_a_checkpoint_and_the_next_start_goes_on(factories, tmp_path):
    straight = Run(factories, tmp_path / "straight", {}, dtype=torch.bfloat16, args=adamw())
    straight.trainer.fit(straight.state)
    shelf = {}

    def terminate(state, report):
        if state.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    first = Run(
        factories, tmp_path / "cut", shelf, dtype=torch.bfloat16, args=adamw(), extra=[terminate]
    )
    first.trainer.fit(first.state)
    assert (first.state.step, first.state.stop_reason) == (6, "a signal asked for it")
    assert signal.getsignal(signal.SIGTERM) == before
    second = Run(factories, tmp_path / "cut", shelf, dtype=torch.bfloat16, args=adamw())
    assert second.state.step == 6
    second.trainer.fit(second.state)
    assert_same(second, straight)


@DTYPES
def test_evaluation_does_not_change_training(dtype, factories, tmp_path):
    runs = [
        Run(factories, tmp_path / str(on), {}, dtype=dtype, args=adamw(), evaluation=on)
        for on in (True, False)
    ]
    for run in runs:
        run.trainer.fit(run.state)
    lines = [[x for x in run.lines() if x["context"] == "train"] for run in runs]
    assert lines[0] == lines[1]
    assert len(runs[0].lines()) > len(runs[1].lines())
    for name, parameter in runs[0].runtime.named_parameters().items():
        assert torch.equal(parameter, runs[1].runtime.named_parameters()[name])


def test_dropout_depends_on_the_seed_and_the_step(factories, tmp_path):
    run = Run(factories, tmp_path, {}, dtype=torch.float32, args=adamw())
    assert run.trainer._seed == 42
    losses = []
    for seed in (42, 42, 43):
        other = Run(factories, tmp_path / str(len(losses)), {}, dtype=torch.float32, args=adamw())
        other.trainer._seed = seed
        report = other.trainer.step(other.state)
        losses.append(report.loss.item())
        other.trainer._batches.close()
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str
)
def test_16_bit_runs_follow_the_fp32_run(dtype, unit, factories, tmp_path):
    low = Run(factories, tmp_path / "low", {}, dtype=dtype, args=adamw())
    full = Run(factories, tmp_path / "full", {}, dtype=torch.float32, args=adamw())
    low.trainer.fit(low.state)
    full.trainer.fit(full.state)
    # A token's loss is off by a few units of the dtype, and the mean over some forty tokens by
    # less than one; the updates, of which Adam normalises the size, by about as much.
    for ours, theirs in zip(low.lines(), full.lines(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=unit / 2)
    for name, parameter in low.runtime.named_parameters().items():
        exact = full.runtime.named_parameters()[name]
        assert parameter.dtype == torch.float32
        assert 0 < (parameter - exact).norm() < unit * exact.norm()

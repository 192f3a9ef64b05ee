import copy
import json
import logging
from dataclasses import dataclass

import pytest
import torch

from lme_parallel.args import DistributedArgs
from lme_parallel.checkpoint.args import LoadArgs, SaveArgs
from lme_parallel.checkpoint.checkpointer import Checkpointer, resume_point
from lme_parallel.checkpoint.errors import CheckpointError, CheckpointMismatchError
from lme_parallel.checkpoint.layout import checkpoint_steps
from lme_parallel.checkpoint.reader import Checkpoint
from lme_parallel.topology import Topology


@dataclass
class State:
    step: int = 0
    tokens: int = 0


class Memory:
    """Something with JSON state."""

    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return copy.deepcopy(self.state)

    def load_state_dict(self, state):
        self.state = dict(state)


class Schedule(Memory):
    def __init__(self):
        super().__init__(position=0)
        self.continued = None

    def step(self):
        self.state["position"] += 1

    def continue_from(self, state, position):
        self.continued = (state, position)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


class Run:
    """A tiny model and all that is saved with it."""

    def __init__(self, folder, *, make=adamw, seed=0, point=None, stateful=None, **args):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
        self.model[0].half_precision = torch.nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.parameters = dict(self.model.named_parameters())
        self.buffers = dict(self.model.named_buffers())
        self.optimizer = None if make is None else make(list(self.parameters.values()))
        self.schedule = Schedule()
        self.loader = Memory(row=0)
        self.restored = 0
        self.state = State()
        self.checkpointer = Checkpointer(
            SaveArgs(save_path=str(folder), save_interval=1, **args),
            parameters=self.parameters,
            buffers=self.buffers,
            optimizer=self.optimizer,
            stateful={"schedule": self.schedule, "loader": self.loader}
            if stateful is None
            else stateful,
            documents={"config.json": {"hidden_size": 4}, "run.resolved.json": {"a": (1, 2)}},
            topology=Topology.from_args(DistributedArgs(), 1, 0),
            after_restore=self._count,
            point=point,
        )

    def _count(self):
        self.restored += 1

    def train(self, steps=1):
        for _ in range(steps):
            torch.manual_seed(self.state.step)
            loss = self.model(torch.randn(8, 5)).square().mean()
            loss = loss + self.model[0].half_precision.float().square().sum()
            loss.backward()
            if self.optimizer is not None:
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.state.step += 1
            self.state.tokens += 8
            self.schedule.step()
            self.loader.state["row"] += 8
        return self

    def save(self):
        self.checkpointer.save(self.state)
        return self

    def tensors(self):
        found = {**self.parameters, **self.buffers}
        if self.optimizer is not None:
            for name, parameter in self.parameters.items():
                for key, value in self.optimizer.state[parameter].items():
                    found[f"{name}.{key}"] = value
        return found


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        other = right[name]
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype, name
            assert torch.equal(value, other), name
        else:
            assert value == other
            assert type(value) is type(other)


OPTIMIZERS = {
    "AdamW": adamw,
    "Adam with amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "SGD without momentum": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adadelta": torch.optim.Adadelta,
    "Adagrad": torch.optim.Adagrad,
    "Adamax": torch.optim.Adamax,
    "ASGD": torch.optim.ASGD,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": torch.optim.RMSprop,
    "Rprop": torch.optim.Rprop,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_restored_run_is_the_saved_one_bit_for_bit(make, is_async, fast_path):
    run = Run(fast_path, make=make, async_checkpointing=is_async).train(2).save()
    run.checkpointer.wait()
    other = Run(fast_path, make=make, seed=1)
    assert other.checkpointer.restore(other.state) == 2
    assert_equal(other.tensors(), run.tensors())
    assert other.state == run.state
    assert other.schedule.state == run.schedule.state
    assert other.loader.state == run.loader.state
    assert other.restored == 1
    # And it goes on as the saved one does.
    assert_equal(other.train(2).tensors(), run.train(2).tensors())


def test_a_restored_optimizer_forgets_what_it_had(fast_path):
    Run(fast_path).save()
    other = Run(fast_path, seed=1).train()
    other.checkpointer.restore(other.state)
    assert not other.optimizer.state


def test_a_parameter_without_state_stays_without(fast_path):
    run = Run(fast_path)
    run.model[0].half_precision.requires_grad_(False)
    run.optimizer.param_groups[0]["params"].pop(list(run.parameters).index("0.half_precision"))
    loss = run.model(torch.ones(4, 5)).sum()
    loss.backward()
    run.optimizer.step()
    run.save()
    other = Run(fast_path, seed=1)
    other.checkpointer.restore(other.state)
    assert other.parameters["0.half_precision"] not in other.optimizer.state
    assert torch.equal(other.parameters["0.half_precision"], run.parameters["0.half_precision"])


def test_nothing_saved_means_a_fresh_start(fast_path):
    run = Run(fast_path)
    before = copy.deepcopy(run.tensors())
    assert run.checkpointer.restore(run.state) is None
    assert_equal(run.tensors(), before)
    assert run.restored == 0
    assert resume_point(SaveArgs(save_path=str(fast_path), save_interval=1), None) is None


def test_the_files_are_those_of_the_format(fast_path):
    Run(fast_path).train().save()
    found = fast_path / "global_step1"
    assert json.loads((fast_path / "latest_checkpointed_iteration.json").read_text()) == {
        "latest_checkpointed_iteration": 1
    }
    assert sorted(each.name for each in found.iterdir()) == [
        "COMMIT",
        "config.json",
        "model",
        "optimizer",
        "run.resolved.json",
        "state.json",
        "zarr.json",
    ]
    commit = json.loads((found / "COMMIT").read_text())
    on_disk = {each.relative_to(found).as_posix() for each in found.rglob("*") if each.is_file()}
    assert set(commit["files"]) == on_disk - {"COMMIT"}
    assert (found / "model/0.weight/c/0/0").stat().st_size == 5 * 4 * 4 + 4
    # A 0-d counter is one file.
    assert (found / "optimizer/0.weight.step/c").stat().st_size == 8
    assert Checkpoint(found).document("run.resolved.json") == {"a": [1, 2]}
    state = Checkpoint(found).document("state.json")
    assert (state["step"], state["tokens"], state["mesh"]["world_size"]) == (1, 8, 1)


def test_a_second_save_of_a_step_does_nothing(fast_path):
    run = Run(fast_path).train().save()
    written = (fast_path / "global_step1/COMMIT").stat().st_mtime_ns
    run.save()
    other = Run(fast_path)
    other.checkpointer.restore(other.state)
    other.save()
    assert (fast_path / "global_step1/COMMIT").stat().st_mtime_ns == written


def test_a_valid_checkpoint_of_somebody_else_is_not_overwritten(fast_path):
    Run(fast_path).train().save()
    with pytest.raises(CheckpointError, match="neither saved nor restored"):
        Run(fast_path, seed=1).train().save()


def test_the_loader_walks_back_and_says_why(fast_path, caplog):
    run = Run(fast_path).train().save()
    expected = copy.deepcopy(run.tensors())
    for _ in range(3):
        run.train().save()
    (fast_path / "global_step4/COMMIT").unlink()
    (fast_path / "global_step3/model/0.weight/c/0/0").unlink()
    # Only found when the values are read.
    chunk = fast_path / "global_step2/optimizer/1.bias.exp_avg/c/0"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    other = Run(fast_path, seed=1)
    with caplog.at_level(logging.WARNING):
        assert other.checkpointer.restore(other.state) == 1
    assert_equal(other.tensors(), expected)
    assert other.state == State(1, 8)
    text = caplog.text
    for reason in ("never committed", "global_step3/model/0.weight/c/0/0", "1.bias.exp_avg"):
        assert reason in text
    # The damaged ones are written anew when the run comes by.
    other.train().save().train().save().train().save()
    third = Run(fast_path, seed=2)
    assert third.checkpointer.restore(third.state) == 4
    assert_equal(third.tensors(), run.tensors())
    assert Checkpoint(fast_path / "global_step2").verify() is None


def test_damaged_checkpoints_alone_are_an_error_and_not_a_fresh_start(fast_path):
    Run(fast_path).train().save()
    (fast_path / "global_step1/state.json").write_text("{}")
    run = Run(fast_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is valid.*move them away"):
        run.checkpointer.restore(run.state)


def test_another_model_is_named_and_nothing_is_overwritten(fast_path):
    Run(fast_path).train().save()
    other = Run(fast_path)
    other.parameters["0.weight"] = torch.nn.Parameter(torch.zeros(5, 5))
    before = copy.deepcopy(other.tensors())
    with pytest.raises(CheckpointMismatchError, match=r"`0.weight` has shape \(4, 5\).*\(5, 5\)"):
        other.checkpointer.restore(other.state)
    assert_equal(other.tensors(), before)
    other.parameters["extra"] = other.parameters.pop("0.bias")
    with pytest.raises(CheckpointMismatchError, match=r"lacks extra; it has besides 0\.bias"):
        other.checkpointer.restore(other.state)


class TestLoadArgs:
    @pytest.fixture
    def saved(self, fast_path):
        run = Run(fast_path / "first").train().save().train().save()
        run.optimizer.param_groups[0]["lr"] = 0.5
        return run.train().save()

    @pytest.fixture
    def start(self, fast_path, saved):
        def start(**values):
            run = Run(fast_path / "second", seed=1)
            args = LoadArgs(load_path=str(fast_path / "first"), **values)
            return run, run.checkpointer.restore(run.state, args)

        return start

    def test_everything_is_taken_over_by_default(self, start, saved):
        run, step = start()
        assert step == 3
        assert_equal(run.tensors(), saved.tensors())
        assert run.state == saved.state
        assert run.loader.state == saved.loader.state
        assert run.optimizer.param_groups[0]["lr"] == 0.5

    def test_iteration_chooses_a_step(self, start):
        run, step = start(iteration=2)
        assert (step, run.state) == (2, State(2, 16))

    def test_an_iteration_that_is_not_there_is_an_error(self, start):
        with pytest.raises(CheckpointError, match="global_step9"):
            start(iteration=9)

    def test_without_the_optimizer_moments_and_rate_are_fresh(self, start, saved):
        run, _ = start(load_optimizer=False, load_lr_scheduler=False)
        assert not run.optimizer.state
        assert run.optimizer.param_groups[0]["lr"] == 1e-3
        assert torch.equal(run.parameters["0.weight"], saved.parameters["0.weight"])
        # This run's own schedule, three steps on.
        assert run.schedule.state == {"position": 3}
        assert run.schedule.continued is None

    def test_without_the_schedule_it_continues_from_the_saved_rate(self, start):
        run, _ = start(load_lr_scheduler=False)
        assert run.schedule.continued == ({"position": 3}, 3)

    def test_a_new_count_starts_the_continued_schedule_at_zero(self, start):
        run, step = start(load_lr_scheduler=False, load_starting_iteration=False)
        assert (step, run.state) == (3, State(0, 0))
        assert run.schedule.continued == ({"position": 3}, 0)

    def test_resume_learning_rate_false_leaves_the_schedule_at_its_start(self, start):
        run, _ = start(load_lr_scheduler=False, resume_learning_rate=False)
        assert run.schedule.continued is None
        assert run.schedule.state == {"position": 0}
        assert run.optimizer.param_groups[0]["lr"] == 1e-3

    def test_without_the_loader_data_start_at_the_beginning(self, start):
        run, _ = start(load_dataloader_state=False)
        assert run.loader.state == {"row": 0}
        assert run.state.step == 3

    def test_a_checkpoint_of_this_run_wins(self, start, fast_path):
        run, _ = start(iteration=1)
        run.train().save()
        other, step = start(iteration=1)
        assert step == 2
        assert_equal(other.tensors(), run.tensors())
        args = SaveArgs(save_path=str(fast_path / "second"), save_interval=1)
        load_args = LoadArgs(load_path=str(fast_path / "first"))
        assert resume_point(args, load_args).path.parent == fast_path / "second"

    def test_resume_point_is_what_restore_takes(self, saved, fast_path):
        args = SaveArgs(save_path=str(fast_path / "third"), save_interval=1)
        load_args = LoadArgs(load_path=str(fast_path / "first"))
        found = resume_point(args, load_args)
        assert found.step == 3
        assert found.document("config.json") == {"hidden_size": 4}

    def test_a_folder_without_checkpoints_is_an_error(self, fast_path):
        run = Run(fast_path / "second")
        args = LoadArgs(load_path=str(fast_path / "nowhere"))
        with pytest.raises(CheckpointError, match="holds no committed checkpoint"):
            run.checkpointer.restore(run.state, args)

    def test_a_checkpoint_without_optimizer_says_what_to_set(self, fast_path):
        Run(fast_path / "first", save_optimizer=False).train().save()
        run = Run(fast_path / "second")
        args = LoadArgs(load_path=str(fast_path / "first"))
        with pytest.raises(CheckpointMismatchError, match="load_optimizer: false"):
            run.checkpointer.restore(run.state, args)


def test_save_optimizer_false_leaves_it_out_and_the_run_still_resumes(fast_path, caplog):
    run = Run(fast_path, save_optimizer=False).train().save()
    assert Checkpoint(fast_path / "global_step1").names("optimizer") == []
    other = Run(fast_path, save_optimizer=False, seed=1)
    with caplog.at_level(logging.WARNING):
        assert other.checkpointer.restore(other.state) == 1
    assert "no optimizer state" in caplog.text
    assert torch.equal(other.parameters["0.weight"], run.parameters["0.weight"])
    assert not other.optimizer.state


def test_a_model_without_optimizer_is_saved_and_restored(fast_path):
    run = Run(fast_path, make=None).train().save()
    other = Run(fast_path, make=None, seed=1)
    assert other.checkpointer.restore(other.state) == 1
    assert_equal(other.tensors(), run.tensors())


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"a": torch.zeros(1)}, r"stateful.thing.a is a Tensor"),
        ({"a": [{1: 2}]}, r"stateful.thing.a\[0\] has a key that is not a string: 1"),
        ({"a": {1, 2}}, "is a set"),
    ],
    ids=["tensor", "integer key", "set"],
)
def test_state_that_json_cannot_hold_is_named(state, reason, fast_path):
    run = Run(fast_path, stateful={"thing": Memory(**state)})
    with pytest.raises(CheckpointError, match=reason):
        run.save()
    assert checkpoint_steps(fast_path) == []


def test_state_that_an_object_refuses_is_a_mismatch(fast_path):
    Run(fast_path).train().save()

    class Strict(Memory):
        def load_state_dict(self, state):
            raise ValueError("the order of the data is another: use `class_args.order: stable`")

    run = Run(fast_path, stateful={"loader": Strict()})
    with pytest.raises(CheckpointMismatchError, match=r"`loader`.*order: stable"):
        run.checkpointer.restore(run.state)


def test_new_state_starts_fresh_with_a_warning(fast_path, caplog):
    Run(fast_path).train().save()
    run = Run(fast_path, stateful={"new": Memory(a=1)})
    with caplog.at_level(logging.WARNING):
        run.checkpointer.restore(run.state)
    assert "no state for `new`" in caplog.text


def test_optimizer_state_other_than_tensors_and_numbers_is_named(fast_path):
    run = Run(fast_path).train()
    run.optimizer.state[run.parameters["0.bias"]]["history"] = [torch.zeros(1)]
    with pytest.raises(CheckpointError, match=r"`AdamW` keeps 0.bias.history as a list"):
        run.save()

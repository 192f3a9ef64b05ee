"""`lme verify-resume`: sound runs pass, and each way to break one is caught and named."""

import re

import pytest
import torch

from lme_cli.loading import load_run
from lme_cli.resume_check import verify_resume

SHRUNK = (
    "model_args.pretrained_config.hidden_size=32",
    "model_args.pretrained_config.num_layers=1",
    "model_args.pretrained_config.vocab_size=512",
    "model_args.pretrained_config.mlp_blocks.0.intermediate_size=32",
    "datasets.0.class_args.sequence_length=32",
    "datasets.0.class_args.eval_steps=1",
    "lr_scheduler_args.num_warmup_steps=4",
)


def test_the_embedded_default_shrunk_is_the_same_bit_for_bit(tmp_path, lme, monkeypatch):
    from lme_cli import quickstart

    library = tmp_path / "lib"
    library.mkdir()
    for number in range(24):
        body = "\n".join(f"def name_{k % 97}(x{number}): return {k}" for k in range(900))
        (library / f"module_{number}.py").write_text(body)
    monkeypatch.setattr(quickstart.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.setattr(quickstart, "MINIMUM_BYTES", 100_000)
    run = tmp_path / "run"
    sets = [
        each for setting in (f"save_args.save_path={run}", *SHRUNK) for each in ("--set", setting)
    ]
    code, out, err = lme("verify-resume", "--steps", "20", "--cut", "7,13", *sets)
    assert code == 0, err
    assert "the resumed run is the same, bit for bit" in out
    for row in ("losses and rates", "data position", "parameters", "optimizer state"):
        assert re.search(rf"^  {row} +[1-9][\d,]* the same$", out, re.M), out
    # Its own directory holds the data and nothing of a run.
    assert [path.name for path in run.iterdir()] == ["data"]


def nudge_a_weight(composed):
    # By far less than a step changes it.
    with torch.no_grad():
        composed.runtime.named_parameters()["blocks.1.mlp.down.weight"].view(-1)[3] += 1e-5
    composed.runtime.finish_step()


def forget_moments(composed):
    for state in composed.trainer._optimizer.state.values():
        state["exp_avg"].zero_()


def read_from_the_start(composed):
    batches = composed.trainer._batches
    batches.load_state_dict({**batches.state_dict(), "position": 0, "cursors": {"debug": 0}})


def skip_a_rate(composed):
    composed.trainer._schedule.step()


@pytest.mark.parametrize(
    ("breakage", "found_in"),
    [
        (nudge_a_weight, {"parameters", "optimizer state"}),
        (forget_moments, {"parameters", "optimizer state"}),
        (read_from_the_start, {"data position", "losses and rates"}),
        (skip_a_rate, {"losses and rates", "schedule and counters"}),
    ],
)
def test_a_broken_resume_is_caught(tiny_run, breakage, found_in):
    findings = verify_resume(load_run(tiny_run), steps=5, cuts=[2], break_it=breakage)
    wrong = {each.name for each in findings if each.difference is not None}
    assert found_in <= wrong
    (first, *_) = [each for each in findings if each.difference is not None]
    assert first.difference
    assert not (tiny_run.parent / "run").exists()


def test_a_broken_resume_ends_with_exit_code_1_and_names_the_first_difference(
    tiny_run, lme, monkeypatch
):
    from lme_core.training.schedules import Schedule

    # As if nobody had saved the schedule.
    monkeypatch.setattr(Schedule, "load_state_dict", lambda self, state: None)
    code, out, err = lme("verify-resume", tiny_run, "--steps", "4", "--cut", "2")
    assert code == 1
    assert re.search(r"^  losses and rates +DIFFER$", out, re.M)
    assert re.search(
        r"^error: the resumed run is another one; first difference in losses and rates:\s+step \d"
        r" train \w+: straight \S+, resumed \S+",
        err,
        re.M,
    ), err


@pytest.mark.parametrize("cut", ["0", "4", "x", ""])
def test_cuts_outside_of_the_steps_are_refused(tiny_run, lme, cut):
    code, _, err = lme("verify-resume", tiny_run, "--steps", "4", "--cut", cut)
    assert code == 1
    assert "`--cut` must" in err

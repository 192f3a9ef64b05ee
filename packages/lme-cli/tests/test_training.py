"""Runs through the command line: what is written, shown, resumed and refused."""

import json
import re

import pytest

from lme_cli.planning import KILL_SWITCH


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_its_directory_and_shows_plain_lines(tiny_run, tmp_path, lme):
    code, out, err = lme("train", tiny_run)
    assert code == 0, err
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert names == {
        "run.yml", "run.resolved.json", "metrics.jsonl", "report.html", "global_step3",
        "global_step6", "latest_checkpointed_iteration.json",
    }  # fmt: skip
    assert (run / "run.yml").read_text() == tiny_run.read_text()
    rows = metrics(run)
    assert [row["step"] for row in rows if row["context"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row["context"] == "val"] == [3, 6]
    # No control characters where nobody is at a terminal.
    assert re.fullmatch(r"[\x20-\x7e\n]*", out)
    assert re.search(r"^step 6/6  loss \d\.\d{4}  learning rate \S+  [\d,]+ tokens/s", out, re.M)
    assert re.search(r"^step 6/6  validation loss \d\.\d{4}$", out, re.M)
    for word in ("device", "parameters", "tokens", "steps", "writes to", "starts from"):
        assert re.search(rf"^  {word} ", out, re.M), word
    tail = out[out.index("Next:") :]
    assert len(re.findall(r"^  lme ", tail, re.M)) == 3


def test_the_same_command_again_continues_and_gives_the_same_numbers(tiny_run, tmp_path, lme):
    straight = tmp_path / "straight"
    assert lme("train", tiny_run, "--set", f"save_args.save_path={straight}")[0] == 0
    (tmp_path / "run").mkdir()
    # Stops after its first step, saved.
    assert lme("train", tiny_run, "--set", "training_parameters.stop_after_seconds=1e-9")[0] == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1]
    code, out, _ = lme("train", tiny_run)
    assert code == 0
    assert "starts from  step 1," in out
    timeless = [
        [{key: value for key, value in row.items() if not _is_speed(key)} for row in metrics(path)]
        for path in (tmp_path / "run", straight)
    ]
    assert timeless[0] == timeless[1]
    code, out, _ = lme("train", tiny_run)
    assert code == 0
    assert "nothing left to train" in out


def _is_speed(key):
    return key.endswith("_seconds") or key in (
        "tokens_per_second", "tflops_per_device", "mfu", "peak_memory_bytes"
    )  # fmt: skip


def test_another_architecture_seed_or_order_is_refused_with_both_remedies(tiny_run, lme):
    assert lme("train", tiny_run, "--set", "training_parameters.stop_after_seconds=1e-9")[0] == 0
    code, _, err = lme(
        "train", tiny_run,
        "--set", "model_args.pretrained_config.hidden_size=16",
        "--set", "random_args.seed=1",
        "--set", "datasets.0.class_args.sequence_length=8",
    )  # fmt: skip
    assert code == 1
    for word in ("hidden_size: saved 32, now 16", "random_args.seed: saved 42, now 1",
                 "datasets[0].class_args.sequence_length: saved 16, now 8",
                 "as they were saved", "another `save_args.save_path`"):  # fmt: skip
        assert word in err
    assert "Traceback" not in err


def test_intervals_and_the_learning_rate_may_change_on_resume(tiny_run, lme, tmp_path):
    assert lme("train", tiny_run, "--set", "training_parameters.stop_after_seconds=1e-9")[0] == 0
    code, _, err = lme(
        "train", tiny_run,
        "--set", "save_args.save_interval=2",
        "--set", "training_parameters.eval_interval=2",
        "--set", "logging_args.log_interval=2",
        "--set", "optimizer_args.class_args.lr=5e-3",
    )  # fmt: skip
    assert code == 0, err
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows if row["context"] == "train"] == [1, 2, 4, 6]
    assert max(row.get("learning_rate", 0) for row in rows) <= 5e-3


def test_a_kill_switch_ends_in_a_checkpoint_and_keeps_the_next_start_away(tiny_run, tmp_path, lme):
    run = tmp_path / "run"
    run.mkdir()
    (run / KILL_SWITCH).touch()
    code, _, err = lme("train", tiny_run)
    assert code == 1
    assert "remove it to train" in err


def test_load_args_start_from_another_run(tiny_run, tmp_path, lme):
    assert lme("train", tiny_run)[0] == 0
    second = tmp_path / "second"
    code, out, err = lme(
        "train", tiny_run,
        "--set", f"save_args.save_path={second}",
        "--set", f"load_args={{load_path: {tmp_path / 'run'}, iteration: 3}}",
    )  # fmt: skip
    assert code == 0, err
    assert "starts from  step 3," in out
    assert [row["step"] for row in metrics(second) if row["context"] == "train"] == [4, 5, 6]
    first = {row["step"]: row for row in metrics(tmp_path / "run") if row["context"] == "train"}
    again = {row["step"]: row for row in metrics(second) if row["context"] == "train"}
    assert [again[step]["loss"] for step in (4, 5, 6)] == [
        first[step]["loss"] for step in (4, 5, 6)
    ]


@pytest.mark.parametrize("command", ["pretrain", "finetune", "distill"])
def test_the_commands_by_method_want_their_method(tiny_run, lme, command):
    code, out, err = lme(command, "--config", tiny_run, "--plan")
    if command == "pretrain":
        assert code == 0
        assert out.startswith("This run would:")
    else:
        assert code == 1
        assert "use `lme train`" in err


def test_a_plan_writes_nothing(tiny_run, tmp_path, lme):
    code, out, _ = lme("train", tiny_run, "--plan")
    assert code == 0
    # 6 steps of 2 rows of 16 tokens.
    assert re.search(r"^  tokens +192$", out, re.M)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_runs_train_and_save_fp32(tiny_run, tmp_path, lme, dtype):
    code, _, err = lme("train", tiny_run, "--set", f"mixed_precision_args.dtype={dtype}")
    assert code == 0, err
    array = json.loads((tmp_path / "run/global_step6/model/embedding.weight/zarr.json").read_text())
    assert array["data_type"] == "float32"
    losses = [row["loss"] for row in metrics(tmp_path / "run") if row["context"] == "train"]
    assert all(loss is not None and 2 < loss < 6 for loss in losses)


def test_evaluation_repeats_what_the_run_logged(tiny_run, tmp_path, lme):
    assert lme("train", tiny_run)[0] == 0
    code, out, err = lme("evaluate", tmp_path / "run", "--split", "val")
    assert code == 0, err
    (record,) = [json.loads(line) for line in out.splitlines()]
    logged = [row for row in metrics(tmp_path / "run") if row["context"] == "val"][-1]
    assert record == logged
    code, out, _ = lme("evaluate", tmp_path / "run" / "global_step3", "--split", "val")
    assert json.loads(out)["step"] == 3


def _poison(monkeypatch, step):
    """Make the loss of one step not a number."""
    from lme_parallel.runtime import DistributedRuntime

    whole, calls = DistributedRuntime.forward_backward, []

    def forward_backward(self, objective, batches):
        sums = whole(self, objective, batches)
        calls.append(None)
        if len(calls) == step:
            for parameter in self.named_parameters().values():
                parameter.grad.fill_(float("nan"))
        return sums

    monkeypatch.setattr(DistributedRuntime, "forward_backward", forward_backward)


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_bad_step_is_recorded_and_ends_the_run_if_asked(
    tiny_run, tmp_path, lme, monkeypatch, policy
):
    _poison(monkeypatch, 4)
    code, _, err = lme("train", tiny_run, "--set", f"training_parameters.bad_step_policy={policy}")
    run = tmp_path / "run"
    (row,) = [json.loads(line) for line in (run / "bad-steps-rank0.jsonl").read_text().splitlines()]
    assert (row["step"], row["grad_norm"], row["policy"]) == (4, "nan", policy)
    assert row["data_position_before"]["position"] == 6
    if policy == "skip":
        assert code == 0, err
        assert all(each["loss"] > 0 for each in metrics(run))
    else:
        assert code == 1
        assert "step 4 gave values that are not finite" in err
        assert "Traceback" not in err
        assert not (run / "global_step6").exists()

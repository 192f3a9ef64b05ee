import hashlib
import json
import math

import pytest
import torch

from lme_core.training.anomalies import BadStepError, StepGuard

BATCH = [{"input_ids": torch.arange(6).view(2, 3)}]


def make(path, **changes):
    settings = {
        "policy": "skip",
        "spike_sigmas": None,
        "record_path": path / "bad.jsonl",
        "device": torch.device("cpu"),
    }
    return StepGuard(**{**settings, **changes})


def judge(guard, step, loss, norm=1.0):
    decided = guard.judge(
        step,
        torch.tensor(loss),
        torch.tensor(norm),
        BATCH,
        {"position": 10 * step},
        {"position": 10 * step + 10},
    )
    return float(decided)


def test_a_bad_step_is_recorded_with_its_batch(tmp_path):
    guard = make(tmp_path)
    assert judge(guard, 1, 2.0) == 1.0
    assert judge(guard, 2, math.nan) == math.inf
    assert judge(guard, 3, 2.0, math.inf) == math.inf
    guard.report()
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]
    assert [row["loss"] for row in rows] == ["nan", "2.0"]
    assert rows[0]["data_position_before"] == {"position": 20}
    digest = hashlib.blake2b(torch.arange(6).numpy().tobytes(), digest_size=16).hexdigest()
    assert rows[0]["tokens_blake2b"] == [digest]
    guard.report()
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 2


def test_good_steps_leave_no_file(tmp_path):
    guard = make(tmp_path, policy="raise", spike_sigmas=3.0)
    judge(guard, 1, 2.0)
    guard.report()
    assert list(tmp_path.iterdir()) == []


def test_raise_names_step_file_and_remedy(tmp_path):
    guard = make(tmp_path, policy="raise")
    judge(guard, 7, math.inf)
    with pytest.raises(BadStepError, match=r"step 7 .*bad\.jsonl.*`training_parameters\.bad_step"):
        guard.report()


def test_an_overflow_of_a_scaled_loss_is_no_bad_step(tmp_path):
    guard = make(tmp_path, policy="raise", scales_loss=True)
    assert judge(guard, 1, 2.0, math.inf) == math.inf
    guard.report()
    assert list(tmp_path.iterdir()) == []


def test_spikes_are_judged_by_accepted_losses_alone_and_after_a_resume_alike(tmp_path):
    losses = [2.0 + 0.1 * math.sin(step) for step in range(30)]
    guard = make(tmp_path, spike_sigmas=5.0)
    for step, loss in enumerate(losses, start=1):
        assert judge(guard, step, loss) == 1.0
    # The reference: exponential means that begin at the first loss.
    mean, square = losses[0], losses[0] ** 2
    for loss in losses[1:]:
        loss = float(torch.tensor(loss))
        mean, square = mean + 0.02 * (loss - mean), square + 0.02 * (loss**2 - square)
    limit = mean + 5 * math.sqrt(square - mean**2)
    second = make(tmp_path, spike_sigmas=5.0)
    second.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for each in (guard, second):
        for _ in range(3):
            assert judge(each, 31, limit + 0.01) == math.inf
        assert judge(each, 32, limit - 0.01) == 1.0


def test_early_losses_are_no_spikes(tmp_path):
    guard = make(tmp_path, spike_sigmas=1.0)
    assert all(judge(guard, step, float(step)) == 1.0 for step in range(1, 20))


def test_rewind_asks_for_the_data_behind_the_last_bad_step(tmp_path):
    guard = make(tmp_path, policy="rewind")
    for step, loss in enumerate((2.0, math.nan, 2.0, math.inf, 2.0), start=1):
        judge(guard, step, loss)
    assert guard.report() == {"position": 50}
    guard.record_rewind(5, 1, {"position": 50})
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows[:-1]] == [2, 4]
    assert rows[-1] == {
        "rewound_from": 5, "rewound_to": 1, "rewinds": 1, "data_position": {"position": 50}
    }  # fmt: skip
    judge(guard, 2, 2.0)
    assert guard.report() is None


def test_rewinds_are_counted_through_restores_and_resumes_and_end(tmp_path):
    guard = make(tmp_path, policy="rewind", max_rewinds=2)
    saved = guard.state_dict()
    judge(guard, 1, math.nan)
    assert guard.report() is not None
    # Going back restores what was saved before; the count stays.
    guard.load_state_dict(saved)
    second = make(tmp_path, policy="rewind", max_rewinds=2)
    second.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    judge(second, 1, math.nan)
    assert second.report() is not None
    judge(second, 1, math.nan)
    with pytest.raises(
        BadStepError, match=r"step 1 .*`training_parameters\.max_rewinds` 2 times.*bad\.jsonl"
    ):
        second.report()


def test_a_replica_goes_back_if_any_other_saw_a_bad_step(tmp_path):
    seen = []

    def reduce(flags):
        seen.append(flags.tolist())
        return torch.tensor([0.0, 1.0])

    guard = make(tmp_path, policy="rewind", reduce=reduce)
    judge(guard, 1, 2.0)
    judge(guard, 2, 2.0)
    assert guard.report() == {"position": 30}
    # One message a look, not a step.
    assert seen == [[0.0, 0.0]]

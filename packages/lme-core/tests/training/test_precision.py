import json

import pytest
import torch

from lme_core.training.precision import LossScaler, MasterWeights, set_tf32


def test_the_model_becomes_a_rounded_copy_and_the_masters_stay_fp32(tiny_model):
    model = tiny_model()
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    masters = MasterWeights(model, torch.bfloat16)
    assert masters.named_parameters().keys() == original.keys()
    for name, copy in model.named_parameters():
        assert torch.equal(masters.named_parameters()[name], original[name])
        assert torch.equal(copy, original[name].bfloat16())


def test_buffers_stay_and_tied_parameters_stay_tied(tiny_model):
    model = tiny_model()
    MasterWeights(model, torch.bfloat16)
    assert model.scale.dtype == torch.float32
    assert model.head.weight is model.embedding.weight


def test_gradients_add_up_in_fp32(tiny_model):
    model = tiny_model()
    masters = MasterWeights(model, torch.bfloat16)
    # In bf16 every addend after the first would be lost: 1 + 1/512 rounds to 1.
    for value in [1.0] + [1 / 512] * 8:
        model.up.bias.grad = torch.full((32,), value, dtype=torch.bfloat16)
        masters.collect_gradients()
        assert model.up.bias.grad is None
    gradient = masters.named_parameters()["up.bias"].grad
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, torch.full((32,), 1 + 8 / 512))
    # What got no gradient has none: an optimizer leaves it alone.
    assert masters.named_parameters()["down.weight"].grad is None


def test_refresh_copies_what_the_optimizer_did(tiny_model):
    model = tiny_model()
    masters = MasterWeights(model, torch.float16)
    with torch.no_grad():
        masters.named_parameters()["up.weight"].add_(0.125)
    masters.refresh()
    assert torch.equal(model.up.weight, masters.named_parameters()["up.weight"].half())


def test_the_scaler_adapts_as_torchs_own():
    ours = LossScaler(torch.device("cpu"), initial_scale=2.0**10, growth_interval=3)
    scale, tracker = torch.tensor(2.0**10), torch.zeros((), dtype=torch.int32)
    for overflow in [0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0]:
        ours.update(torch.tensor(bool(overflow)))
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(overflow)), 2.0, 0.5, 3)
        assert ours.scale(torch.ones(())) == scale
        assert ours.inverse() * scale == 1


def test_the_scale_neither_vanishes_nor_overflows():
    scaler = LossScaler(torch.device("cpu"), initial_scale=2.0, growth_interval=1)
    for _ in range(3):
        scaler.update(torch.tensor(True))
    assert scaler.state_dict()["scale"] == 1.0
    for _ in range(200):
        scaler.update(torch.tensor(False))
    assert torch.isfinite(scaler.scale(torch.ones(())))


def test_the_scalers_state_is_json():
    scaler = LossScaler(torch.device("cpu"), growth_interval=5)
    for overflow in (False, True, False):
        scaler.update(torch.tensor(overflow))
    state = json.loads(json.dumps(scaler.state_dict()))
    assert state == {"scale": 2.0**15, "good_steps": 1}
    copy = LossScaler(torch.device("cpu"), growth_interval=5)
    copy.load_state_dict(state)
    for _ in range(4):
        copy.update(torch.tensor(False))
    assert copy.state_dict() == {"scale": 2.0**16, "good_steps": 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_parameters_keep_a_master_without_gradient(tiny_model, dtype):
    model = tiny_model()
    model.up.requires_grad_(False)
    masters = MasterWeights(model, dtype)
    assert not masters.named_parameters()["up.weight"].requires_grad
    assert model.up.weight.dtype == dtype


def test_tf32_is_off_unless_asked_for():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        set_tf32(True)
        assert torch.get_float32_matmul_precision() == "high"
        set_tf32(False)
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]

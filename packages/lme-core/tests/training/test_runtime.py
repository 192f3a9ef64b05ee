import copy

import pytest
import torch

from lme_core.training.objectives import Distillation, NextToken
from lme_core.training.runtime import SingleDevice
from lme_core.training.teacher_args import TeacherArgs


def micro_batches(loader, count):
    return [next(loader) for _ in range(count)]


def joined(batches):
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def gradients(runtime):
    return {name: p.grad.clone() for name, p in runtime.named_parameters().items()}


def assert_close_in_norm(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        difference = (ours[name].double() - theirs[name].double()).norm()
        assert difference <= tolerance * theirs[name].double().norm(), name


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)], ids=str
)
@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("count", [2, 5])
def test_accumulation_equals_one_big_batch_with_ragged_masks(
    dtype, tolerance, auxiliary, count, tiny_model, counting_loader
):
    batches = micro_batches(counting_loader(ragged=True), count)
    targets = [(batch["labels"] != -100).sum().item() for batch in batches]
    assert len(set(targets)) > 1
    objective = NextToken({"aux_loss": 0.1})
    small = SingleDevice(tiny_model(auxiliary=auxiliary).to(dtype), dtype=dtype)
    big = SingleDevice(tiny_model(auxiliary=auxiliary).to(dtype), dtype=dtype)
    ours = small.forward_backward(objective, batches)
    theirs = big.forward_backward(objective, [joined(batches)])
    assert_close_in_norm(gradients(small), gradients(big), tolerance)
    assert ours.targets.item() == theirs.targets.item() == sum(targets)
    assert ours.values.keys() == theirs.values.keys()
    for name, value in ours.values.items():
        assert value.item() == pytest.approx(theirs.values[name].item(), rel=tolerance)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=tolerance)


def test_the_loss_is_the_mean_over_targets_plus_weighted_means_over_sequences(
    tiny_model, counting_loader
):
    model = tiny_model(auxiliary=True)
    batches = micro_batches(counting_loader(ragged=True), 3)
    runtime = SingleDevice(copy.deepcopy(model))
    sums = runtime.forward_backward(NextToken({"aux_loss": 0.25}), batches)

    batch = joined(batches)
    outputs = model(batch, logits=True)
    nll = torch.nn.functional.cross_entropy(
        outputs.logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100
    )
    mean = outputs.auxiliary["aux_loss"] / 6
    loss = nll + 0.25 * mean
    loss.backward()
    assert sums.values["lm_loss"].item() == pytest.approx(nll.item(), rel=1e-6)
    assert sums.values["aux_loss"].item() == pytest.approx(mean.item(), rel=1e-6)
    assert sums.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert_close_in_norm(gradients(runtime), expected, 1e-6)


def test_an_unweighted_auxiliary_loss_is_logged_and_not_minimised(tiny_model, counting_loader):
    batches = micro_batches(counting_loader(), 2)
    with_term = SingleDevice(tiny_model(auxiliary=True))
    without = SingleDevice(tiny_model())
    sums = with_term.forward_backward(NextToken(), batches)
    assert sums.loss == without.forward_backward(NextToken(), batches).loss
    assert sums.values["aux_loss"] > 0
    assert_close_in_norm(gradients(with_term), gradients(without), 0)


def test_gradients_of_the_step_before_do_not_linger(tiny_model, counting_loader):
    loader = counting_loader()
    first, second = next(loader), next(loader)
    runtime, fresh = SingleDevice(tiny_model()), SingleDevice(tiny_model())
    runtime.forward_backward(NextToken(), [first])
    runtime.forward_backward(NextToken(), [second])
    fresh.forward_backward(NextToken(), [second])
    assert_close_in_norm(gradients(runtime), gradients(fresh), 0)
    runtime.finish_step()
    assert all(p.grad is None for p in runtime.named_parameters().values())


def test_a_step_without_targets_has_no_loss_and_no_gradient(tiny_model, counting_loader):
    batch = next(counting_loader())
    batch["labels"].fill_(-100)
    runtime = SingleDevice(tiny_model())
    sums = runtime.forward_backward(NextToken(), [batch])
    assert (sums.loss, sums.targets) == (0, 0)
    assert runtime.clip_gradients(1.0) == 0


@pytest.mark.parametrize("max_norm", [0.05, 1e9, None])
def test_clipping_is_torchs(max_norm, tiny_model, counting_loader):
    batches = micro_batches(counting_loader(), 2)
    runtime, other = SingleDevice(tiny_model()), SingleDevice(tiny_model())
    runtime.forward_backward(NextToken(), batches)
    other.forward_backward(NextToken(), batches)
    norm = runtime.clip_gradients(max_norm)
    limit = float("inf") if max_norm is None else max_norm
    expected = torch.nn.utils.clip_grad_norm_(other.named_parameters().values(), limit)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_close_in_norm(gradients(runtime), gradients(other), 1e-6)


def test_the_loss_scale_leaves_no_trace_in_gradients(tiny_model, counting_loader):
    batches = micro_batches(counting_loader(ragged=True), 3)
    half, full = SingleDevice(tiny_model(), dtype=torch.float16), SingleDevice(tiny_model())
    half.forward_backward(NextToken(), batches)
    full.forward_backward(NextToken(), batches)
    norms = half.clip_gradients(None).item(), full.clip_gradients(None).item()
    # fp16 keeps 11 bits, and a few roundings add up.
    assert norms[0] == pytest.approx(norms[1], rel=2e-3)
    assert_close_in_norm(gradients(half), gradients(full), 5e-3)


def test_a_loss_scale_that_overflows_is_halved_and_the_norm_says_so(tiny_model, counting_loader):
    runtime = SingleDevice(tiny_model(), dtype=torch.float16)
    runtime.load_state_dict({"loss_scale": {"scale": 2.0**40, "good_steps": 7}})
    runtime.forward_backward(NextToken(), [next(counting_loader())])
    assert not torch.isfinite(runtime.clip_gradients(1.0))
    assert runtime.state_dict() == {"loss_scale": {"scale": 2.0**39, "good_steps": 0}}


def test_evaluation_gives_the_sums_without_dropout_or_gradient(tiny_model, counting_loader):
    batch = next(counting_loader(ragged=True))
    model = tiny_model(dropout=True)
    runtime = SingleDevice(copy.deepcopy(model))
    sums = runtime.forward(NextToken(), batch)
    logits = model(batch, logits=True).logits.double()
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum"
    )
    assert sums.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.targets == (batch["labels"] != -100).sum()
    assert not sums.total.requires_grad


def test_a_model_without_memory_gets_its_initial_values(tiny_model):
    with torch.device("meta"):
        model = tiny_model()
    runtime = SingleDevice(model, dtype=torch.bfloat16)
    for name, parameter in runtime.named_parameters().items():
        assert torch.equal(parameter, model.initial_value(name, None)), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, model.initial_value(name, None).bfloat16())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, model.initial_value(name, None).to(buffer.dtype)), name
    assert model.head.weight is model.embedding.weight


def test_only_persistent_buffers_belong_to_the_state(tiny_model):
    assert list(SingleDevice(tiny_model()).named_buffers()) == ["scale"]


def test_distillation_adds_the_divergence_and_spares_the_teacher(tiny_model, counting_loader):
    batches = micro_batches(counting_loader(ragged=True), 2)
    args = TeacherArgs(model_name="t", kl_divergence_method="backward", kl_divergence_weight=0.5)
    teacher = tiny_model(seed=3)
    student = tiny_model()
    runtime = SingleDevice(copy.deepcopy(student))
    sums = runtime.forward_backward(Distillation(teacher, args), batches)

    batch = joined(batches)
    valid = batch["labels"] != -100
    log_p = student(batch, logits=True).logits[valid].log_softmax(-1)
    log_q = teacher(batch, logits=True).logits[valid].log_softmax(-1)
    nll = torch.nn.functional.nll_loss(log_p, batch["labels"][valid])
    divergence = torch.nn.functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    (nll + 0.5 * divergence).backward()
    assert sums.values["lm_loss"].item() == pytest.approx(nll.item(), rel=1e-6)
    assert sums.values["kl_divergence"].item() == pytest.approx(divergence.item(), rel=1e-5)
    assert sums.loss.item() == pytest.approx((nll + 0.5 * divergence).item(), rel=1e-6)
    expected = {name: p.grad for name, p in student.named_parameters()}
    assert_close_in_norm(gradients(runtime), expected, 2e-6)
    assert all(not p.requires_grad for p in teacher.parameters())


def test_evaluation_puts_the_model_in_evaluation_mode_and_back(tiny_model, counting_loader):
    class Watched(tiny_model):
        def forward(self, batch, **settings):
            modes.append(self.training)
            return super().forward(batch, **settings)

    modes = []
    runtime = SingleDevice(Watched())
    batch = next(counting_loader())
    runtime.forward(NextToken(), batch)
    runtime.forward_backward(NextToken(), [batch])
    assert modes == [False, True]


def test_a_model_without_memory_and_initial_values_is_refused():
    with pytest.raises(ValueError, match="needs an `initial_value"):
        SingleDevice(torch.nn.Linear(2, 2, device="meta"))


def test_a_step_needs_a_batch(tiny_model):
    with pytest.raises(ValueError, match="at least one micro batch"):
        SingleDevice(tiny_model()).forward_backward(NextToken(), [])

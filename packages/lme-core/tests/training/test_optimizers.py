import sys
from typing import get_args

import pytest
import torch

from lme_core.training import optimizer_args
from lme_core.training.optimizer_class_args import AdamWClassArgs, SGDClassArgs
from lme_core.training.optimizers import (
    OptimizerArgs,
    TorchAdamWArgs,
    build_optimizer,
    step_optimizer,
)
from lme_kernels import device
from lme_kernels.optim import AdamW
from lme_kernels.policy import KernelArgs, KernelPolicy

UNION = get_args(OptimizerArgs)[0]
KINDS = {
    get_args(member)[0].__name__.removesuffix("Args"): get_args(member)[0]
    for member in get_args(UNION)
}
BUILT = sorted(KINDS.keys() - {"TorchLBFGS"})


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up.weight": (7, 5), "up.bias": (7,), "down.weight": (5, 7)}
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in shapes.items()
    }


def give_gradients(named, step):
    generator = torch.Generator().manual_seed(100 + step)
    for name in sorted(named):
        named[name].grad = torch.randn(named[name].shape, generator=generator)


def test_all_twelve_are_known():
    assert len(KINDS) == 12


@pytest.mark.parametrize("name", BUILT)
def test_three_steps_equal_torch_alone(name, tiny_traits):
    args = KINDS[name]()
    named = parameters()
    optimizer = build_optimizer(args, named, tiny_traits(named))

    # Torch alone, with its own defaults (the run file's for AdamW), biases not decayed.
    plain = parameters()
    torch_class = getattr(torch.optim, name.removeprefix("Torch"))
    settings = {}
    if name == "TorchAdamW":
        settings = {"lr": 1e-5, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    weights = [plain["down.weight"], plain["up.weight"]]
    bias = {"params": [plain["up.bias"]]}
    if name != "TorchRprop":
        bias["weight_decay"] = 0.0
    reference = torch_class([{"params": weights}, bias], **settings)

    for step in range(3):
        give_gradients(named, step)
        give_gradients(plain, step)
        step_optimizer(optimizer, torch.tensor(1.0))
        reference.step()
    for each in named:
        # The fused update rounds in another order: a few units in the last place.
        torch.testing.assert_close(named[each], plain[each], rtol=2e-6, atol=1e-7)
    moved = (named["up.weight"] - parameters()["up.weight"]).abs().max()
    assert moved > 1e-6


def test_lbfgs_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"TorchLBFGS.*line search.*use TorchAdamW"):
        optimizer_args.TorchLBFGSArgs()


def test_groups_are_sorted_named_and_decayed_by_traits(tiny_traits):
    named = parameters()
    optimizer = build_optimizer(TorchAdamWArgs(), named, tiny_traits(named))
    assert [(g["name"], g["param_names"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("normal", ["down.weight", "up.weight"], 0.1),
        ("no_weight_decay", ["up.bias"], 0.0),
    ]
    assert optimizer.param_groups[0]["params"] == [named["down.weight"], named["up.weight"]]


def test_mup_divides_the_rate_and_keeps_the_other_mark(tiny_traits):
    named = parameters()
    args = TorchAdamWArgs(params_group_method="mup", class_args=AdamWClassArgs(lr=0.9))
    optimizer = build_optimizer(args, named, tiny_traits(named), m_width=3.0)
    groups = {
        g["name"]: (g["param_names"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups
    }
    # Nothing is left for `no_weight_decay`: the empty group is dropped.
    assert groups == {
        "normal": (["down.weight"], 0.9, 0.1),
        "mup": (["up.weight"], pytest.approx(0.3), 0.1),
        "mup_no_weight_decay": (["up.bias"], pytest.approx(0.3), 0.0),
    }


def test_frozen_parameters_are_left_out(tiny_traits):
    named = parameters()
    named["up.weight"].requires_grad_(False)
    optimizer = build_optimizer(TorchAdamWArgs(), named, tiny_traits(named))
    assert [g["param_names"] for g in optimizer.param_groups] == [["down.weight"], ["up.bias"]]


def test_mup_needs_a_width(tiny_traits):
    named = parameters()
    with pytest.raises(ValueError, match="needs `m_width`"):
        build_optimizer(TorchAdamWArgs(params_group_method="mup"), named, tiny_traits(named))


def test_a_parameter_that_the_model_does_not_know_is_an_error(tiny_traits):
    named = parameters()
    with pytest.raises(ValueError, match=r"nothing about the parameters up\.bias"):
        build_optimizer(TorchAdamWArgs(), named, tiny_traits(["down.weight", "up.weight"]))


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_step_whose_norm_is_not_finite_changes_nothing(name, norm, tiny_traits):
    named = parameters()
    optimizer = build_optimizer(KINDS[name](), named, tiny_traits(named))
    give_gradients(named, 0)
    step_optimizer(optimizer, torch.tensor(1.0))
    before = {each: named[each].detach().clone() for each in named}
    state = {
        each: {k: v.clone() for k, v in optimizer.state[named[each]].items() if torch.is_tensor(v)}
        for each in named
    }
    for parameter in named.values():
        parameter.grad = torch.full_like(parameter, float("nan"))
    step_optimizer(optimizer, torch.tensor(norm))
    for each in named:
        assert torch.equal(named[each], before[each])
        for key, value in state[each].items():
            assert torch.equal(optimizer.state[named[each]][key], value)


def test_the_fused_update_is_taken_unless_the_file_says_otherwise(tiny_traits):
    named = parameters()
    chosen = build_optimizer(TorchAdamWArgs(), named, tiny_traits(named))
    assert all(group["fused"] for group in chosen.param_groups)
    for refused in (AdamWClassArgs(fused=False), AdamWClassArgs(foreach=True)):
        other = build_optimizer(TorchAdamWArgs(class_args=refused), named, tiny_traits(named))
        assert not any(group["fused"] for group in other.param_groups)


@pytest.mark.parametrize(
    ("entries", "class_args", "is_own"),
    [
        (["adamw@triton"], {}, True),
        (["adamw@torch"], {}, False),
        ([], {}, False),
        (["adamw@triton"], {"amsgrad": True}, False),
        (["adamw@triton"], {"foreach": True}, False),
    ],
)
def test_kernel_args_choose_the_update_of_adamw(entries, class_args, is_own, tiny_traits):
    kernels = KernelPolicy.from_args(KernelArgs(kernels=entries))
    args = TorchAdamWArgs(class_args=AdamWClassArgs(lr=1e-2, **class_args))
    named, plain = parameters(), parameters()
    chosen = build_optimizer(args, named, tiny_traits(named), None, kernels)
    assert isinstance(chosen, AdamW) == is_own
    if not is_own or device.why_unavailable("triton", "cpu") is not None:
        return
    torchs = build_optimizer(args, plain, tiny_traits(plain))
    for step in range(3):
        for tensors in (named, plain):
            give_gradients(tensors, step)
        step_optimizer(chosen, torch.tensor(1.0))
        step_optimizer(torchs, torch.tensor(1.0))
    # Not counted, as its norm was not finite.
    step_optimizer(chosen, torch.tensor(float("nan")))
    for each in named:
        # Three updates in another order of rounding.
        torch.testing.assert_close(named[each], plain[each], rtol=1e-6, atol=1e-7)
        assert chosen.state[named[each]]["step"] == 3


@pytest.mark.parametrize("name", ["TorchAdamW", "TorchSGD", "TorchRMSprop"])
def test_neither_building_nor_stepping_loads_the_compiler(name, tiny_traits, monkeypatch):
    # Any attempt to import it now fails.
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    named = parameters()
    optimizer = build_optimizer(KINDS[name](), named, tiny_traits(named))
    give_gradients(named, 0)
    step_optimizer(optimizer, torch.tensor(1.0))
    assert isinstance(optimizer, getattr(torch.optim, name.removeprefix("Torch")))
    assert not torch.equal(named["up.weight"], parameters()["up.weight"])


def cut_update(args, cut, threads, traits):
    """Three steps on 50001 elements, whole or in two tensors, from an unaligned start."""
    generator = torch.Generator().manual_seed(5)
    draws = [torch.randn(50_001, generator=generator) for _ in range(4)]
    parts = [slice(0, cut), slice(cut, None)] if cut else [slice(None)]
    named = {
        f"{i}.weight": torch.nn.Parameter(draws[0][part].clone()) for i, part in enumerate(parts)
    }
    optimizer = build_optimizer(args, named, traits(named))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for gradient in draws[1:]:
            for parameter, part in zip(named.values(), parts, strict=True):
                parameter.grad = gradient[part].clone()
            step_optimizer(optimizer, torch.tensor(1.0))
    finally:
        torch.set_num_threads(before)
    return torch.cat([parameter.detach() for parameter in named.values()])


@pytest.mark.parametrize(
    "args",
    [
        TorchAdamWArgs(),
        optimizer_args.TorchAdamArgs(),
        optimizer_args.TorchAdagradArgs(),
        optimizer_args.TorchSGDArgs(class_args=SGDClassArgs(momentum=0.9)),
    ],
    ids=lambda args: args.class_name,
)
def test_the_fused_update_gives_the_same_bits_for_any_cut_and_thread_count(args, tiny_traits):
    whole = cut_update(args, 0, 1, tiny_traits)
    # An odd cut moves every element to another lane of the vector unit.
    for cut, threads in ((17, 1), (33_333, 1), (0, 2), (17, 2)):
        assert torch.equal(cut_update(args, cut, threads, tiny_traits), whole)

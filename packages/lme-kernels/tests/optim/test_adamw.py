"""AdamW against torch's and against float64; its state, its rounding, and what it must not do."""

import copy

import pytest
import torch

from lme_kernels.op import UnsupportedBackendError
from lme_kernels.optim import AdamW
from lme_kernels.optim.local import local
from lme_kernels.testing import relative_error

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    pytest.param("torch", "cpu"),
    pytest.param(
        "triton",
        WHERE,
        marks=[pytest.mark.gpu] if WHERE == "cuda" else [],
    ),
]
# A vector, past a chunk, past a block, empty, one element.
SHAPES = ((3,), (65536 + 4096,), (17, 333), (0,), (1,))


def parameters(where, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(where, dtype))
        for shape in shapes
    ]


def set_grads(tensors, step):
    generator = torch.Generator().manual_seed(100 + step)
    for each in tensors:
        # As uneven as gradients are: some elements hardly ever move.
        drawn = torch.randn(each.shape, generator=generator)
        each.grad = (drawn**3).to(each)


def train(optimizer, tensors, steps=3):
    for step in range(steps):
        set_grads(tensors, step)
        optimizer.step()


def test_the_reference_gives_the_bits_of_torch():
    mine, theirs = parameters("cpu"), parameters("cpu")
    options = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    train(AdamW(mine, **options), mine)
    train(torch.optim.AdamW(theirs, foreach=False, **options), theirs)
    for ours, other in zip(mine, theirs, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize(("backend", "where"), BACKENDS)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_updates_match_float64(backend, where, maximize, beta1):
    tensors = parameters(where)
    exact = [torch.nn.Parameter(each.detach().cpu().double()) for each in tensors]
    options = {"lr": 1e-2, "betas": (beta1, 0.999), "weight_decay": 0.1, "maximize": maximize}
    ours = AdamW(tensors, backend=backend, **options)
    train(ours, tensors)
    theirs = torch.optim.AdamW(exact, foreach=False, **options)
    for step in range(3):
        set_grads(tensors, step)
        for each, other in zip(tensors, exact, strict=True):
            other.grad = each.grad.cpu().double()
        theirs.step()
    for each, other in zip(tensors, exact, strict=True):
        # Three updates of about 1e-2 and their sums are rounded to float32.
        torch.testing.assert_close(
            each.detach().cpu().double(), other.detach(), rtol=4e-7, atol=4e-8
        )
        for name in ("exp_avg", "exp_avg_sq"):
            # Three sums in float32; where they cancel the error is that of the terms.
            assert relative_error(ours.state[each][name], theirs.state[other][name]) < 3e-7
        assert float(ours.state[each]["step"]) == 3


@pytest.mark.parametrize(("backend", "where"), BACKENDS)
def test_what_a_scaler_sets_is_obeyed(backend, where):
    plain, scaled = parameters(where), parameters(where)
    first, second = (AdamW(each, backend=backend) for each in (plain, scaled))
    train(first, plain, 1)
    set_grads(scaled, 0)
    for each in scaled:
        each.grad *= 8
    second.grad_scale = torch.tensor(8.0, device=where)
    second.found_inf = torch.tensor(0.0, device=where)
    second.step()
    for each, other in zip(scaled, plain, strict=True):
        # Eight is a power of two: nothing is rounded.
        assert torch.equal(each, other)
    second.found_inf = torch.tensor(1.0, device=where)
    set_grads(scaled, 1)
    before = copy.deepcopy(scaled)
    second.step()
    for each, other in zip(scaled, before, strict=True):
        assert torch.equal(each, other)
        assert float(second.state[each]["step"]) == 1


@pytest.mark.parametrize(("backend", "where"), BACKENDS)
def test_the_learning_rate_may_be_a_tensor(backend, where):
    plain, changed = parameters(where), parameters(where)
    first = AdamW(plain, lr=2e-2, backend=backend)
    lr = torch.tensor(1.0, device=where)
    second = AdamW(changed, lr=lr, backend=backend)
    lr.fill_(2e-2)
    train(first, plain)
    train(second, changed)
    for each, other in zip(changed, plain, strict=True):
        # On the device the rate is float32 from the start.
        torch.testing.assert_close(each, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("backend", "where"), BACKENDS)
def test_mixed_dtypes_groups_and_missing_gradients(backend, where):
    tensors = parameters(where, shapes=((5,), (7, 3), (11,)))
    tensors[1].data = tensors[1].data.half()
    groups = [{"params": tensors[:2], "lr": 1e-1}, {"params": tensors[2:], "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=1e-2, backend=backend)
    exact = [torch.nn.Parameter(each.detach().cpu().double()) for each in tensors]
    theirs = torch.optim.AdamW(
        [{"params": exact[:2], "lr": 1e-1}, {"params": exact[2:], "weight_decay": 0.0}], lr=1e-2
    )
    set_grads(tensors, 0)
    tensors[0].grad = None
    for each, other in zip(tensors[1:], exact[1:], strict=True):
        other.grad = each.grad.cpu().double()
    optimizer.step()
    theirs.step()
    assert torch.equal(tensors[0].detach().cpu().double(), exact[0].detach())
    for each, other in zip(tensors, exact, strict=True):
        # A parameter of float16 is rounded to it once.
        rtol = 1e-3 if each.dtype == torch.float16 else 1e-6
        torch.testing.assert_close(
            each.detach().cpu().double(), other.detach(), rtol=rtol, atol=1e-7
        )


def test_checkpoints_interchange_with_torch():
    mine, theirs = parameters("cpu"), parameters("cpu")
    ours, other = AdamW(mine, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2, foreach=False)
    train(ours, mine)
    train(other, theirs)
    from_theirs, from_mine = AdamW(mine), torch.optim.AdamW(theirs, foreach=False)
    from_theirs.load_state_dict(other.state_dict())
    from_mine.load_state_dict(ours.state_dict())
    # What torch calls fused is ours to say, not a file's.
    for group in from_mine.param_groups:
        group.update(fused=None, foreach=False)
    for optimizer, tensors in ((from_theirs, mine), (from_mine, theirs)):
        set_grads(tensors, 9)
        optimizer.step()
    for each, same in zip(mine, theirs, strict=True):
        assert torch.equal(each, same)
        assert float(from_theirs.state[each]["step"]) == 4


def test_means_of_bfloat16_parameters_stay_float32_through_a_checkpoint():
    tensors = parameters("cpu", torch.bfloat16)
    optimizer = AdamW(tensors)
    train(optimizer, tensors, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    again = AdamW(tensors)
    again.load_state_dict(saved)
    for each in tensors:
        assert again.state[each]["exp_avg_sq"].dtype == torch.float32
        assert torch.equal(again.state[each]["exp_avg_sq"], optimizer.state[each]["exp_avg_sq"])


def test_misuse_is_refused():
    tensors = parameters("cpu")
    for options, name in (
        ({"lr": -1.0}, "`lr`"),
        ({"betas": (0.9, 1.0)}, "`betas`"),
        ({"eps": -1.0}, "`eps`"),
        ({"weight_decay": -0.1}, "`weight_decay`"),
        ({"seed": -1}, "`seed`"),
    ):
        with pytest.raises(ValueError, match=name):
            AdamW(tensors, **options)
    with pytest.raises(UnsupportedBackendError, match="has no implementation `cuda`"):
        AdamW(tensors, backend="cuda")
    amsgrad = torch.optim.AdamW(tensors, amsgrad=True)
    with pytest.raises(ValueError, match="`amsgrad` is not supported"):
        AdamW(tensors).load_state_dict(amsgrad.state_dict())
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        AdamW(table.parameters()).step()


def test_the_kernel_refuses_float64_and_strides():
    wide = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64))]
    apart = [torch.nn.Parameter(torch.ones(4, 6)[:, ::2])]
    for tensors in (wide, apart):
        tensors[0].grad = torch.ones_like(tensors[0])
        with pytest.raises(UnsupportedBackendError):
            AdamW(tensors, backend="triton").step()
        before = tensors[0].detach().clone()
        AdamW(tensors).step()
        assert not torch.equal(before, tensors[0])


def test_a_closure_is_called_with_gradients_and_its_value_returned():
    (tensor,) = parameters("cpu", shapes=((3,),))
    optimizer = AdamW([tensor])

    def closure():
        optimizer.zero_grad()
        loss = tensor.square().sum()
        loss.backward()
        return loss

    before = float(tensor.detach().square().sum())
    assert float(optimizer.step(closure).detach()) == before
    assert float(tensor.detach().square().sum()) < before


def test_a_plain_tensor_is_its_own_local_part():
    tensor = torch.ones(2)
    assert local(tensor) is tensor


@pytest.mark.gpu
def test_it_neither_waits_nor_misses_a_replay():
    tensors, eager = parameters("cuda"), parameters("cuda")
    lr = torch.tensor(1e-2, device="cuda")
    optimizer, plain = (AdamW(each, lr=lr, backend="triton") for each in (tensors, eager))
    set_grads(tensors, 0)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    source = [each.grad.clone() for each in tensors]
    with torch.cuda.graph(graph):
        # Gradients at new addresses: the table is written by the graph.
        for each, grad in zip(tensors, source, strict=True):
            each.grad = grad * 1.0
        optimizer.step()
    lr.fill_(3e-2)
    graph.replay()
    graph.replay()
    set_grads(eager, 0)
    for rate in (1e-2, 1e-2, 3e-2, 3e-2):
        lr.fill_(rate)
        plain.step()
    for each, other in zip(tensors, eager, strict=True):
        assert torch.equal(each, other)
        assert float(optimizer.state[each]["step"]) == 4

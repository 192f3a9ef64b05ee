"""Losses of processes that share the vocabulary, against the loss of one that has all of it."""

import threading

import pytest
import torch

from lme_kernels.functional import cross_entropy, fused_linear_cross_entropy
from lme_kernels.ops.cross_entropy.options import VocabularyShard
from lme_kernels.ops.fused_linear_cross_entropy import FUSED_LINEAR_CROSS_ENTROPY, chunks
from lme_kernels.testing import assert_matches, device_for, fused_backends

BACKENDS = ["torch", *fused_backends(FUSED_LINEAR_CROSS_ENTROPY)]
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.02, "softcap": 5.0, "logit_scale": 0.7}
# Parts of different sizes; the labels of some rows are in the first, of some in the last.
PARTS = [slice(0, 10), slice(10, 24)]


class Processes:
    """Threads that take turns and reduce tensors among them, in the place of processes."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=60)
        # Triton's interpreter serves one thread at a time.
        self.turn = threading.Lock()
        self.given = [None] * size
        self.calls = []

    def reduce(self, rank, x, op):
        self.given[rank] = x
        self.calls.append((rank, op))
        self._wait()
        stacked = torch.stack(self.given)
        self._wait()
        return stacked.amax(0) if op == "max" else stacked.sum(0)

    def run(self, function):
        results = [None] * len(self.given)
        errors = []

        def one(rank):
            with self.turn:
                try:
                    results[rank] = function(rank)
                except Exception as error:
                    errors.append(error)
                    self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    def _wait(self):
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


def gradients(loss, leaves, weights):
    weights = weights.to(loss.dtype) if loss.ndim else torch.tensor(1.7).to(loss)
    return torch.autograd.grad(loss, leaves, weights)


@pytest.fixture
def labels():
    labels = torch.randint(0, 24, (6,))
    labels[1] = -100
    return labels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cross_entropy(reduction, backend, labels):
    where = device_for(backend)
    logits = (torch.randn(6, 24) * 3).to(where)
    labels, weights = labels.to(where), torch.randn(6).to(where)
    options = {**OPTIONS, "reduction": reduction}
    whole = logits.double().requires_grad_()
    exact = cross_entropy(whole, labels, backend="torch", **options)
    (exact_gradient,) = gradients(exact, [whole], weights)
    group = Processes(2)

    def process(rank):
        part = logits[:, PARTS[rank]].detach().requires_grad_()
        shard = VocabularyShard(PARTS[rank].start, 24, lambda x, op: group.reduce(rank, x, op))
        loss = cross_entropy(part, labels, shard=shard, backend=backend, **options)
        return loss.detach(), gradients(loss, [part], weights)[0]

    results = group.run(process)
    for loss, _ in results:
        assert_matches(loss, exact.detach().float())
    gradient = torch.cat([each for _, each in results], dim=-1)
    assert_matches(gradient, exact_gradient.float())
    # Two reductions in all, as promised, and none in the backward.
    assert [op for rank, op in group.calls if rank == 0] == ["max", "sum"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_fused_linear_cross_entropy(reduction, backend, labels, monkeypatch):
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 0)
    monkeypatch.setattr(chunks, "CPU_ROWS", 4)
    where = device_for(backend)
    x, weight = torch.randn(6, 8).to(where), torch.randn(24, 8).to(where)
    labels, weights = labels.to(where), torch.randn(6).to(where)
    options = {**OPTIONS, "reduction": reduction}
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    exact = cross_entropy(leaves[0] @ leaves[1].t(), labels, backend="torch", **options)
    exact_gradients = gradients(exact, leaves, weights)
    group = Processes(2)

    def process(rank):
        own = [x.detach().requires_grad_(), weight[PARTS[rank]].detach().requires_grad_()]
        shard = VocabularyShard(PARTS[rank].start, 24, lambda x, op: group.reduce(rank, x, op))
        loss = fused_linear_cross_entropy(*own, labels, shard=shard, backend=backend, **options)
        return loss.detach(), *gradients(loss, own, weights)

    results = group.run(process)
    for loss, _, _ in results:
        assert_matches(loss, exact.detach().float())
    # Every process has a share of the gradient of x, and all of that of its own weight.
    assert_matches(results[0][1] + results[1][1], exact_gradients[0].float())
    assert_matches(torch.cat([each for _, _, each in results]), exact_gradients[1].float())

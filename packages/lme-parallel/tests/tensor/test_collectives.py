"""Exchanges, their gradients, and a vocabulary in parts, against what one process computes."""

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

from lme_parallel.tensor import collectives
from lme_parallel.tensor.collectives import Group
from lme_parallel.tensor.padding import PadBatch
from lme_parallel.tensor.vocabulary import GatheredLogits, Lookup
from lme_parallel.testing import run_distributed

SIZE = 2


def inputs():
    """What each process gives, and the gradient of what it gets; (process, B, S, H)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SIZE, 2, 4, 3, generator=generator).double() for _ in range(2)]


def exchange(name):
    """Send through one exchange; return result and gradient."""
    rank = distributed.get_rank()
    group = Group(distributed.group.WORLD.group_name, SIZE, rank)
    x, grad = (each[rank] for each in inputs())
    if name in ("scatter_out", "part_out"):
        grad = grad.chunk(SIZE, dim=1)[0]
    if name in ("gather_in", "gather_whole"):
        x = x.chunk(SIZE, dim=1)[0]
    x = x.clone().requires_grad_()
    y = getattr(collectives, name)(x, group)
    (of_x,) = torch.autograd.grad(y, x, grad)
    return y.detach(), of_x


def expected(name, rank):
    x, grad = inputs()
    halves_of_x = [each.chunk(SIZE, dim=1)[0] for each in x]
    halves_of_grad = [each.chunk(SIZE, dim=1)[0] for each in grad]
    mine = {
        "copy_in": (x[rank], grad.sum(0)),
        "sum_out": (x.sum(0), grad[rank]),
        "gather_in": (torch.cat(halves_of_x, 1), grad.sum(0).chunk(SIZE, 1)[rank]),
        "scatter_out": (x.sum(0).chunk(SIZE, 1)[rank], torch.cat(halves_of_grad, 1)),
        "gather_whole": (torch.cat(halves_of_x, 1), grad[rank].chunk(SIZE, 1)[rank]),
        "part_out": (x[rank].chunk(SIZE, 1)[rank], torch.cat(halves_of_grad, 1)),
        "share_gradient": (x[rank], grad[rank] / SIZE),
    }
    return mine[name]


NAMES = [
    "copy_in",
    "sum_out",
    "gather_in",
    "scatter_out",
    "gather_whole",
    "part_out",
    "share_gradient",
]


def exchange_all():
    return {name: exchange(name) for name in NAMES}


def test_exchanges_and_their_gradients():
    for rank, found in enumerate(run_distributed(exchange_all, SIZE)):
        for name in NAMES:
            for actual, wanted in zip(found[name], expected(name, rank), strict=True):
                # Two numbers added in either order have the same bits.
                assert torch.equal(actual, wanted), name


def vocabulary():
    """A table of 7 tokens, ids, hidden states and a gradient of logits."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(7, 3, generator=generator).double()
    x = torch.randn(2, 5, 3, generator=generator).double()
    grad = torch.randn(2, 5, 7, generator=generator).double()
    return weight, torch.tensor([[0, 3, 4, 6, 3], [6, 6, 1, 2, 5]]), x, grad


def look_up():
    rank = distributed.get_rank()
    group = Group(distributed.group.WORLD.group_name, SIZE, rank)
    weight, ids, x, grad = vocabulary()
    table = nn.Embedding(1, 3)
    # The first process has four rows, the last three.
    table.weight = nn.Parameter(weight.split(4)[rank])
    rows = Lookup(table, rank * 4, group)(ids)
    (of_rows,) = torch.autograd.grad(rows, table.weight, x)
    x = x.requires_grad_()
    logits = GatheredLogits(F.linear, 7, 4, group)(x, table.weight)
    of_x, of_weight = torch.autograd.grad(logits, (x, table.weight), grad)
    return [each.detach() for each in (rows, of_rows, logits, of_x, of_weight)]


def test_tokens_and_logits_of_a_vocabulary_in_parts():
    found = run_distributed(look_up, SIZE)
    weight, ids, x, grad = vocabulary()
    weight, x = weight.requires_grad_(), x.requires_grad_()
    rows, logits = F.embedding(ids, weight), F.linear(x, weight)
    (of_rows,) = torch.autograd.grad(rows, weight, x)
    of_x, of_weight = torch.autograd.grad(logits, (x, weight), grad)
    close = torch.testing.assert_close
    for rank, (part_rows, part_of_rows, part_logits, _, part_of_weight) in enumerate(found):
        assert torch.equal(part_rows, rows)
        close(part_of_rows, of_rows.split(4)[rank])
        close(part_logits, logits.detach())
        close(part_of_weight, of_weight.split(4)[rank])
    close(found[0][3] + found[1][3], of_x)


def test_padding_is_no_target_and_not_valid():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    batch = {"input_ids": ids, "labels": ids, "token_index": ids, "dropout_key": torch.tensor(1)}
    padded = PadBatch(2)(batch)
    assert padded["input_ids"].tolist() == [[1, 2, 3, 0], [4, 5, 6, 0]]
    assert padded["labels"].tolist() == [[1, 2, 3, -100], [4, 5, 6, -100]]
    assert padded["valid"].tolist() == [[True, True, True, False]] * 2
    assert padded["dropout_key"] is batch["dropout_key"]
    assert PadBatch(3)(batch) is batch
    known = torch.tensor([[True, True, False], [True, False, False]])
    valid = PadBatch(2)({**batch, "valid": known})["valid"]
    assert torch.equal(valid, F.pad(known, (0, 1)))


def test_packed_rows_are_not_padded():
    batch = {"input_ids": torch.zeros(1, 3, dtype=torch.long), "cu_seqlens": torch.tensor([0, 3])}
    with pytest.raises(ValueError, match=r"`sequence_parallel: true`.*multiple of 2 tokens.*got 3"):
        PadBatch(2)(batch)

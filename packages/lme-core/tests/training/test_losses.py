import pytest
import torch
from torch.nn import functional as F

from lme_core.training.losses import nll_and_divergence


def inputs(rows, vocabulary, dtype):
    student = torch.randn(rows, vocabulary, dtype=dtype) * 3
    teacher = torch.randn(rows, vocabulary, dtype=dtype) * 3
    labels = torch.randint(vocabulary, (rows,))
    labels[::4] = -100
    return student.requires_grad_(), teacher, labels


def reference(student, teacher, labels, method):
    """Both sums from torch's own losses, in fp64."""
    valid = labels != -100
    log_p = student.double().log_softmax(-1)[valid]
    log_q = teacher.double().log_softmax(-1)[valid]
    nll = F.nll_loss(log_p, labels[valid], reduction="sum")
    # `kl_div(input, target)` is KL(target || input).
    pair = (log_q, log_p) if method == "forward" else (log_p, log_q)
    return nll, F.kl_div(*pair, reduction="sum", log_target=True)


@pytest.mark.parametrize("method", ["forward", "backward"])
# Less than a chunk of rows; more than two, not a multiple.
@pytest.mark.parametrize("rows", [5, 2051])
def test_sums_and_gradients_equal_torchs_losses(method, rows):
    student, teacher, labels = inputs(rows, 11, torch.float64)
    ours = nll_and_divergence(student, teacher, labels, method=method)
    theirs = reference(student, teacher, labels, method)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    # Different weights, so that the two gradients cannot be exchanged.
    (mine,) = torch.autograd.grad(0.3 * ours[0] + 1.7 * ours[1], student)
    (expected,) = torch.autograd.grad(0.3 * theirs[0] + 1.7 * theirs[1], student)
    torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-14)
    assert (mine[labels == -100] == 0).all()


def test_bf16_logits_are_turned_into_fp32_probabilities():
    student, teacher, labels = inputs(64, 1000, torch.bfloat16)
    ours = nll_and_divergence(student, teacher, labels, method="forward")
    theirs = reference(student, teacher, labels, "forward")
    # fp32 sums over 64 rows of 1000; in bf16 they would be off by parts in a hundred.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0, check_dtype=False)
    (mine,) = torch.autograd.grad(ours[1], student)
    (expected,) = torch.autograd.grad(theirs[1], student)
    # Rounded once to bf16's 8 bits, from fp32 (ours) or fp64.
    torch.testing.assert_close(mine, expected, rtol=2**-7, atol=1e-6)


def test_the_divergence_of_equals_is_zero():
    student, _, labels = inputs(8, 5, torch.float32)
    _, divergence = nll_and_divergence(student, student, labels, method="backward")
    assert divergence.item() == pytest.approx(0, abs=1e-6)


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="must share a vocabulary"):
        nll_and_divergence(
            torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2).long(), method="forward"
        )

"""One row of the benchmark: times, memory and error of one variant of one case."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lme_kernels.bench.calls import Case, Cost, Draw
from lme_kernels.bench.timing import OutOfTimeError, Stopwatch, Times, limit
from lme_kernels.bench.variants import Run, build


@dataclass(slots=True)
class Row:
    """What was measured; what failed is in `faults`."""

    op: str
    case: str
    variant: str
    dtype: str
    cost: Cost | None = None
    is_automatic: bool = False
    """Whether a call that names no backend runs this one."""
    times: dict[str, Times] = field(default_factory=dict)
    """By "forward" (no gradient wanted), "backward" (of a kept graph), "both", each also with
    "graph " before it: replays of a CUDA graph."""
    peak_bytes: int | None = None
    """Memory of "both" beyond the arguments: results, gradients and what is in between."""
    error: float | None = None
    """Largest relative error of a result or gradient, against the torch reference in the same
    dtype."""
    faults: dict[str, str] = field(default_factory=dict)


# What waits for the device: a failed capture may disturb later ones.
NOT_CAPTURED = frozenset({("sort_by_expert", "eager"), ("continuous_count", "eager")})

# Outputs and gradients.
Results = tuple[Sequence[Tensor], Sequence[Tensor]]


def gradients_of(outputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Choose the outputs to differentiate, and weights for them.

    Args:
        outputs: Outputs of a call.

    Returns:
        Those that have a gradient; and as many tensors of random numbers, or one for a scalar.
    """
    differentiable = [each for each in outputs if each is not None and each.requires_grad]
    weights = []
    for index, each in enumerate(differentiable):
        generator = torch.Generator(each.device).manual_seed(index)
        weights.append(
            torch.ones_like(each)
            if each.ndim == 0
            else torch.randn(each.shape, generator=generator, device=each.device, dtype=each.dtype)
        )
    return differentiable, weights


def results_of(run: Run, leaves: Sequence[Tensor]) -> Results:
    """Run a call once, with gradients if any are to be had."""
    outputs = run()
    differentiable, weights = gradients_of(outputs)
    if not leaves or not differentiable:
        return outputs, ()
    return outputs, torch.autograd.grad(differentiable, leaves, weights, allow_unused=True)


def relative_error(ours: Results, expected: Results) -> float:
    """Largest root mean square of a difference over that of what is expected.

    Args:
        ours: Outputs and gradients.
        expected: The same of the reference. What only one of them has is not compared.

    Returns:
        The error, NaN if there is a NaN.
    """
    worst = 0.0
    for mine, theirs in zip((*ours[0], *ours[1]), (*expected[0], *expected[1]), strict=False):
        if mine is None or theirs is None or not theirs.is_floating_point():
            continue
        exact = theirs.detach().float()
        difference = mine.detach().float() - exact
        scale = float(exact.square().mean().sqrt()) or 1.0
        error = float(difference.square().mean().sqrt()) / scale
        if error != error:
            return error
        worst = max(worst, error)
    return worst


def measure(
    case: Case,
    variant: str,
    draw: Callable[[], Draw],
    watch: Stopwatch,
    *,
    expected: Results | None,
    with_graph: bool,
    seconds: float | None,
) -> Row:
    """Measure one variant of one case; whatever fails becomes a text.

    Args:
        case: The case.
        variant: Which code.
        draw: Makes what draws the tensors, anew for each variant: some overwrite their arguments.
        watch: Times on the device.
        expected: Results of the reference; `None` compares nothing.
        with_graph: Whether to replay CUDA graphs too.
        seconds: The most that all of it may take; `None` for any.

    Returns:
        The row.
    """
    drawn = draw()
    row = Row(case.op, case.name, variant, str(drawn.dtype).removeprefix("torch."))
    try:
        with limit(seconds):
            _fill(row, case, variant, drawn, watch, expected, with_graph)
    except (Exception, OutOfTimeError) as error:
        row.faults["run"] = _text(error)
    gc.collect()
    if watch.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _fill(
    row: Row,
    case: Case,
    variant: str,
    draw: Draw,
    watch: Stopwatch,
    expected: Results | None,
    with_graph: bool,
) -> None:
    call = case.make(draw)
    row.cost = call.cost
    run, leaves = build(case, call, variant)
    first = results_of(run, leaves)
    if expected is not None:
        row.error = relative_error(first, expected)
    differentiable, weights = gradients_of(first[0])
    has_gradient = bool(leaves) and bool(differentiable)
    del first, differentiable

    def forward() -> object:
        with torch.no_grad():
            return run()

    def both() -> object:
        outputs = run()
        chosen = [each for each in outputs if each is not None and each.requires_grad]
        return outputs, torch.autograd.grad(chosen, leaves, weights, allow_unused=True)

    runs: dict[str, Callable[[], object]] = {"forward": forward}
    if has_gradient:
        runs["both"] = both
    row.peak_bytes = watch.peak_bytes(runs.get("both", forward))
    for name, each in runs.items():
        _attempt(row, name, each, watch)
    if has_gradient:
        _attempt_backward(row, run, leaves, weights, watch)
    if with_graph and watch.device.type == "cuda" and (case.op, variant) not in NOT_CAPTURED:
        for name, each in runs.items():
            _attempt_graph(row, name, each, watch)


def _attempt(row: Row, name: str, run: Callable[[], object], watch: Stopwatch) -> None:
    try:
        row.times[name] = watch.times(run)
    except OutOfTimeError:
        raise
    except Exception as error:
        row.faults[name] = _text(error)


def _attempt_backward(
    row: Row, run: Run, leaves: list[Tensor], weights: list[Tensor], watch: Stopwatch
) -> None:
    """The graph is kept: each backward reads what one forward saved."""
    outputs = run()
    chosen = [each for each in outputs if each is not None and each.requires_grad]

    def backward() -> object:
        return torch.autograd.grad(chosen, leaves, weights, retain_graph=True, allow_unused=True)

    _attempt(row, "backward", backward, watch)


def _attempt_graph(row: Row, name: str, run: Callable[[], object], watch: Stopwatch) -> None:
    try:
        reason = watch.why_not_graph(run)
        if reason is not None:
            row.faults[f"graph {name}"] = reason
            return
        replay = watch.graph(run)
    except OutOfTimeError:
        raise
    except Exception as error:
        row.faults[f"graph {name}"] = _text(error)
        return
    _attempt(row, f"graph {name}", replay, watch)


def _text(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"

"""How the stages of a mixture of experts run: which product by which kernel, in which tiles."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a product in Triton is cut up."""

    rows: int
    """Rows of the result a program makes."""
    columns: int
    """Columns of the result a program makes."""
    depth: int
    """Elements of the sum that are loaded at a time."""
    num_warps: int
    """Warps a program."""
    num_stages: int
    """Loads in flight."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which stages take torch's `grouped_mm`, the others being Triton, and the tiles of Triton.

    Where `grouped_mm` cannot serve (another dtype than bfloat16, biases, a CPU), Triton does.
    """

    up: bool = True
    """First product of the forward; Triton gathers tokens and activates in the same kernel."""
    down: bool = True
    """Second product of the forward."""
    down_grad: bool = True
    """Gradient of the activations; Triton gathers, and makes those of pre-activations too."""
    up_grad: bool = True
    """Gradient of the gathered tokens."""
    weight_grad: bool = True
    """Gradients of both weights; Triton gathers tokens as it loads them."""
    product_tiles: Tiles | None = None
    """Tiles of `up`, `down` and `up_grad`; `None` for the rule's."""
    down_grad_tiles: Tiles | None = None
    """Tiles of `down_grad`; `None` for the rule's."""
    weight_tiles: Tiles | None = None
    """Tiles of `weight_grad`; `None` for the rule's."""


# What `using` fixes, for the calls of one thread or task.
FIXED: ContextVar[Plan | None] = ContextVar("lme_kernels_moe_plan", default=None)


def current_plan() -> Plan:
    """Plan of the calls made here: the one that `using` fixes, else the default."""
    if torch.compiler.is_compiling():
        return Plan()
    return FIXED.get() or Plan()


@contextmanager
def using(plan: Plan) -> Iterator[None]:
    """Run calls by a given plan inside a `with` block, in this thread only.

    Args:
        plan: What to run them by; their backward too must be inside for its tiles.

    Yields:
        Nothing.
    """
    token = FIXED.set(plan)
    try:
        yield
    finally:
        FIXED.reset(token)


def tiles_of(stage: str, dtype: torch.dtype, rows_per_expert: int, small: bool) -> Tiles:
    """Tiles of a stage in Triton.

    Args:
        stage: "product", "down_grad" or "weight".
        dtype: Dtype of the operands.
        rows_per_expert: Choices an expert has on average.
        small: Whether shared memory is that of GPUs before Hopper, or the interpreter runs.

    Returns:
        The current plan's tiles if it has any, else those of a rule.
    """
    plan = FIXED.get() or Plan()
    fixed = {
        "product": plan.product_tiles,
        "down_grad": plan.down_grad_tiles,
        "weight": plan.weight_tiles,
    }[stage]
    if fixed is not None:
        return fixed
    if dtype == torch.float32:
        # No tensor cores in full precision: what counts is that the tiles fit.
        return Tiles(64, 64, 32, 4, 2)
    rows = 64 if stage != "weight" and rows_per_expert < 96 else 128
    if small:
        return Tiles(rows, 64 if stage == "down_grad" else 128, 32, 4, 3)
    if stage == "down_grad" or rows == 64:
        return Tiles(rows, 128, 64, 8 if rows == 128 else 4, 4)
    return Tiles(128, 256, 64, 8, 3)

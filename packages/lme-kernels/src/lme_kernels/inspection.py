"""What each op has, why a call takes which implementation, and how often each ran."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from lme_kernels.functional import ALL_OPS
from lme_kernels.op import CALLS, Backend, Op


@dataclass(frozen=True, slots=True)
class Explanation:
    """One implementation of an op, seen from one call."""

    op: str
    backend: str
    why_not: str | None
    """Why it cannot serve the call; `None` if it can."""
    chosen: bool
    """Whether automatic choice takes it."""


def explain(name: str, *tensors: Tensor | None) -> list[Explanation]:
    """List the implementations of an op, and for each why a call would or would not take it.

    Args:
        name: Name of the op.
        tensors: Tensors of the call in question, as its public function takes them.

    Returns:
        One entry an implementation, fastest first, the torch reference last. Exactly one of them
        is chosen.

    Raises:
        ValueError: If there is no such op, or no tensor is given.
    """
    if name not in ALL_OPS:
        raise ValueError(f"there is no op `{name}`; there are {', '.join(ALL_OPS)}")
    if not tensors or tensors[0] is None:
        raise ValueError("`explain` needs the call's tensors: the first one decides the device")
    op = ALL_OPS[name]
    chosen = op.choose(None, *tensors)
    reasons = {each: op.why_not(each, *tensors) for each in (*op.implementations, Backend.TORCH)}
    # A backend may serve a call and yet not be automatic: before it is proven, or on a CPU.
    usable = [each for each, reason in reasons.items() if reason is None]
    functions = {each: op.choose(each, *tensors) for each in usable}
    return [
        Explanation(name, str(each), reason, functions.get(each) is chosen)
        for each, reason in reasons.items()
    ]


def table() -> str:
    """Write the matrix of ops and backends as Markdown.

    Returns:
        A table with one row an op and one column a backend; a cell says "yes", "by name" (never
        chosen automatically) or nothing. The last column lists implementations that are no
        backend of this package but another library's kernels.
    """
    rows = [
        "| op | " + " | ".join(Backend) + " | others |",
        "| --- " * (2 + len(Backend)) + "|",
    ]
    for name, op in ALL_OPS.items():
        cells = [_cell(op, backend) for backend in Backend]
        cells.append(", ".join(each for each in op.implementations if each not in set(Backend)))
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


@contextmanager
def count_calls() -> Iterator[Counter[str]]:
    """Count the calls of each implementation inside a `with` block, in this thread only.

    Yields:
        Calls by `op@backend`. Calls inside compiled code are not counted.
    """
    counts: Counter[str] = Counter()
    token = CALLS.set(counts)
    try:
        yield counts
    finally:
        CALLS.reset(token)


def _cell(op: Op, backend: Backend) -> str:
    if backend is Backend.TORCH:
        return "yes"
    if backend not in op.implementations:
        return ""
    return "by name" if backend in op.manual else "yes"

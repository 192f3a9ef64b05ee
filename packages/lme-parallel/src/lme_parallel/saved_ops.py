"""Which results of a recomputed block are kept, by the plain names that users give their ops."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from types import MappingProxyType
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lme_parallel.args import SavedOp

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Makes what a checkpoint runs in forwards, and again."""

_LINEAR = frozenset(
    {"aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::_grouped_mm", "aten::_scaled_grouped_mm"}
)
OPS: Mapping[SavedOp, frozenset[str]] = MappingProxyType(
    {
        "attention": frozenset(
            {
                "aten::_scaled_dot_product_flash_attention",
                "aten::_scaled_dot_product_flash_attention_for_cpu",
                "aten::_scaled_dot_product_efficient_attention",
                "aten::_scaled_dot_product_cudnn_attention",
                "aten::_flash_attention_forward",
                "aten::_efficient_attention_forward",
                "aten::_cudnn_attention_forward",
                "flex_attention",
                "flash_attn::_flash_attn_forward",
                "flash_attn::_flash_attn_varlen_forward",
                "flash_attn_3::_flash_attn_forward",
            }
        ),
        "linear": _LINEAR,
        "matmul": _LINEAR | {"aten::bmm", "aten::baddbmm"},
        # What was waited for is the same memory as what was sent for.
        "communication": frozenset(
            {
                "_c10d_functional::all_gather_into_tensor",
                "_c10d_functional::all_reduce",
                "_c10d_functional::all_to_all_single",
                "_c10d_functional::reduce_scatter_tensor",
                "_c10d_functional::wait_tensor",
            }
        ),
    }
)
"""Names that torch dispatches, without overloads."""
DEFAULT: tuple[SavedOp, ...] = ("attention", "linear")
"""What costs most to compute again, for what it takes to keep."""


def keep_results(names: Iterable[SavedOp]) -> Contexts:
    """Make the contexts of a checkpoint that keeps results of some ops.

    Source: torch.utils.checkpoint.create_selective_checkpoint_contexts.

    Args:
        names: Keys of `OPS`.
    """
    kept = frozenset[str]().union(*(OPS[name] for name in names))
    # A partial function is what a compiler can take.
    return partial(create_selective_checkpoint_contexts, partial(_decide, kept))


def _decide(kept: frozenset[str], context: object, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """Say what happens to a result; `op` is an overload or a higher-order operator."""
    is_kept = op.name().partition(".")[0] in kept
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

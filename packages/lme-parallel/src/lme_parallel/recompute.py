"""Activation checkpointing: blocks run again in the backward pass instead of being remembered.

All of a block, or all but the ops whose results are kept.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from lme_parallel.args import DistributedArgs, GradientCheckpointingArgs
from lme_parallel.saved_ops import DEFAULT, keep_results

logger = logging.getLogger(__name__)


def layers_to_recompute(args: DistributedArgs, num_layers: int) -> tuple[int, ...]:
    """Return the layers that `gradient_checkpointing_method` and its arguments choose.

    Args:
        args: The `distributed_args` section.
        num_layers: Layers of the whole model.

    Returns:
        Global layer indices, ascending; empty without a method.

    Raises:
        ValueError: If `num_blocks` is more than the model has.
    """
    chosen = args.gradient_checkpointing_args
    if args.gradient_checkpointing_method is None:
        return ()
    if args.gradient_checkpointing_method == "full":
        return tuple(range(num_layers))
    limit = num_layers if chosen.num_blocks is None else chosen.num_blocks
    if limit > num_layers:
        raise ValueError(
            f"`gradient_checkpointing_args.num_blocks` must be at most the model's {num_layers}"
            f" layers, got {limit}"
        )
    return tuple(range(0, limit, chosen.checkpoint_every_n_layers or 1))


def apply_recompute(
    blocks: Mapping[str, nn.Module], args: DistributedArgs, *, num_layers: int | None = None
) -> None:
    """Make the chosen blocks recompute themselves; names of parameters stay as they are.

    Args:
        blocks: Blocks by global layer index as a string; a pipeline stage holds some of them.
        args: The `distributed_args` section.
        num_layers: Layers of the whole model; `None`: up to the last block given.

    Raises:
        ValueError: As in `layers_to_recompute`.
    """
    _warn_without_effect(args)
    if num_layers is None:
        num_layers = 1 + max((int(key) for key in blocks), default=-1)
    chosen = set(layers_to_recompute(args, num_layers))
    given = args.gradient_checkpointing_args
    settings: dict[str, Any] = {"use_reentrant": given.use_reentrant}
    if args.gradient_checkpointing_method == "selective":
        saved = DEFAULT if given.save_ops is None else given.save_ops
        settings["context_fn"] = keep_results(saved)
    for key, block in blocks.items():
        if int(key) in chosen:
            _recompute(block, settings)


def _recompute(block: nn.Module, settings: Mapping[str, Any]) -> None:
    forward = block.forward

    # Only the instance changes: a wrapping module would rename every parameter below it.
    @wraps(forward)
    def recomputed(*inputs: object, **options: object) -> object:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        run = partial(forward, **options)
        if settings["use_reentrant"]:
            return _reentrant(run, inputs)
        return checkpoint(run, *inputs, **settings)

    block.forward = recomputed


def _reentrant(run: Callable[..., object], inputs: tuple[object, ...]) -> object:
    # Reentrant checkpoints see no tensor inside a tuple or a mapping, neither as an input nor as
    # an output, and would cut its gradient: they are given flat lists.
    leaves, structure = tree_flatten(inputs)
    made: list[TreeSpec] = []

    def flat(*values: object) -> tuple[object, ...]:
        results, of_results = tree_flatten(run(*tree_unflatten(values, structure)))
        made.append(of_results)
        return tuple(results)

    results = checkpoint(flat, *leaves, use_reentrant=True)
    return tree_unflatten(results, made[0])


def _warn_without_effect(args: DistributedArgs) -> None:
    given = args.gradient_checkpointing_args
    if given.block_name is not None:
        logger.warning(
            "`gradient_checkpointing_args.block_name` has no effect: blocks are found by structure"
        )
    chooses = (given.checkpoint_every_n_layers, given.num_blocks) != (None, None)
    if args.gradient_checkpointing_method == "full" and chooses:
        logger.warning(
            "`gradient_checkpointing_args` has no effect with `gradient_checkpointing_method:"
            " full`, which recomputes every block; use `block`"
        )
    if args.gradient_checkpointing_method in ("block", "full") and given.save_ops is not None:
        logger.warning(
            "`gradient_checkpointing_args.save_ops` has no effect without"
            " `gradient_checkpointing_method: selective`"
        )
    if args.gradient_checkpointing_method is None and given != GradientCheckpointingArgs():
        logger.warning(
            "`gradient_checkpointing_args` has no effect without `gradient_checkpointing_method`"
        )

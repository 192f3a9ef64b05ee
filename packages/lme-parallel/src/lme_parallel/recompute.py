"""Activation checkpointing: blocks run again in the backward pass instead of being remembered."""

import logging
from collections.abc import Callable, Mapping
from functools import partial, wraps

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from lme_parallel.args import DistributedArgs, GradientCheckpointingArgs

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
    for key, block in blocks.items():
        if int(key) in chosen:
            _recompute(block, use_reentrant=args.gradient_checkpointing_args.use_reentrant)


def _recompute(block: nn.Module, *, use_reentrant: bool) -> None:
    forward = block.forward

    # Only the instance changes: a wrapping module would rename every parameter below it.
    @wraps(forward)
    def recomputed(*inputs: object, **options: object) -> object:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        run = partial(forward, **options)
        if use_reentrant:
            return _reentrant(run, inputs)
        return checkpoint(run, *inputs, use_reentrant=False)

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
    if args.gradient_checkpointing_method is None and given != GradientCheckpointingArgs():
        logger.warning(
            "`gradient_checkpointing_args` has no effect without `gradient_checkpointing_method`"
        )

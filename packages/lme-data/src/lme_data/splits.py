"""How many samples a run needs, and which sequences belong to which split."""

import math
import re
from collections.abc import Sequence

SPLITS = ("train", "val", "test")
"""Names of the splits, in the order of `split: 98,1,1`."""


def parse_split(split: str | float) -> list[float]:
    """Read shares such as `98,1,1` into three fractions that sum to 1.

    Args:
        split: Up to three numbers, separated by anything that is neither digit nor point.

    Raises:
        ValueError: If there is no number, more than three, or they sum to zero.

    Source: the field's pattern, `[.0-9]+`, padded with zeros.
    """
    text = str(split)
    try:
        numbers = [float(found) for found in re.findall(r"[.0-9]+", text)]
    except ValueError as error:
        raise ValueError(f"`split` must be like `98,1,1`, got {text!r}") from error
    if not 1 <= len(numbers) <= 3 or sum(numbers) <= 0 or "-" in text:
        raise ValueError(f"`split` must be one to three shares like `98,1,1`, got {text!r}")
    numbers += [0.0] * (3 - len(numbers))
    total = sum(numbers)
    return [number / total for number in numbers]


def split_bounds(fractions: Sequence[float], num_sequences: int) -> list[int]:
    """Cut sequences into splits.

    Args:
        fractions: Share of each split, summing to 1.
        num_sequences: Sequences of the corpus.

    Returns:
        One bound more than there are splits; split i holds sequences `bounds[i]` to
        `bounds[i + 1]`, exclusive. Rounding is to even; the last bound is exact.
    """
    bounds = [0]
    for fraction in fractions:
        bounds.append(bounds[-1] + round(fraction * float(num_sequences)))
    excess = bounds[-1] - num_sequences
    return [bounds[0], *(bound - excess for bound in bounds[1:])]


def sample_targets(
    *,
    num_training_steps: int,
    global_batch_size: int,
    eval_interval: int | None,
    eval_steps: int,
) -> tuple[int, int, int]:
    """Samples the field's trainers size train, validation and test for.

    Args:
        num_training_steps: Optimizer steps.
        global_batch_size: Sequences of a step.
        eval_interval: Steps between evaluations; `None` evaluates at the end only.
        eval_steps: Global batches of one evaluation.
    """
    per_evaluation = eval_steps * global_batch_size
    evaluations = 1 if eval_interval is None else num_training_steps // eval_interval + 1
    return num_training_steps * global_batch_size, evaluations * per_evaluation, per_evaluation


def blend_sizes(weights: Sequence[float], targets: Sequence[int]) -> list[list[int]]:
    """Samples asked of each corpus of a blend: its share and half a percent more.

    Args:
        weights: Shares, summing to 1.
        targets: Samples wanted of the blend, one number a split.

    Returns:
        One list a corpus, one number a split.
    """
    return [[math.ceil(target * weight * 1.005) for target in targets] for weight in weights]

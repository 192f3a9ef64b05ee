"""From the `datasets` section to the loaders of a run."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lme_data.context import DataContext
from lme_data.dataset import DatasetArgs, MegatronDatasetArgs
from lme_data.loader import EvaluationLoader, Loader
from lme_data.manifest import read_manifest
from lme_data.opening import BatchSizes, ExampleOpener, Opener, TokenOpener
from lme_data.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

DEFAULT_EVAL_STEPS = 10
"""Global batches of one evaluation where `eval_steps` is absent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaders:
    """What a run reads."""

    train: Loader
    """Training batches."""
    val: EvaluationLoader | None
    """Validation batches, all datasets together; `None` if there are none."""
    test: EvaluationLoader | None
    """Test batches; `None` if there are none."""
    val_groups: Mapping[str, EvaluationLoader] = field(default_factory=dict)
    """Validation batches by name of the dataset or group, where there are several."""
    test_groups: Mapping[str, EvaluationLoader] = field(default_factory=dict)
    """Test batches by name of the dataset, where there are several."""
    source_names: tuple[str, ...] = ()
    """Name of each number in a training batch's `source`."""
    eos_token_id: int | None = None
    """End of text, from the tokenizer or the data's manifests."""


def build_loaders(
    datasets: Sequence[DatasetArgs],
    *,
    tuning_method: Literal["pretraining", "full_finetuning", "distillation"] = "pretraining",
    micro_batch_size: int,
    global_batch_size: int,
    num_training_steps: int,
    data_rank: int = 0,
    data_world_size: int = 1,
    evaluate: bool = True,
    eval_steps: int | None = None,
    seed: int = 42,
    vocab_size: int | None = None,
    tokenizer: TextTokenizer | None = None,
    reset_attention_mask: bool = False,
    reset_position_ids: bool = False,
    loss_mask: Literal["output_only", "no_mask"] = "output_only",
    ignore_sampling_proportion_for_validation: bool = False,
    pad_to_multiple_of: int = 8,
    pin_memory: bool = False,
    is_endless: bool = False,
) -> Loaders:
    """Open the datasets of a run.

    Args:
        datasets: Entries of the run file; names must differ.
        tuning_method: Finetuning reads prompts and answers, the others rows of one length.
        micro_batch_size: Rows of a batch of one rank.
        global_batch_size: Rows of an optimizer step over all ranks.
        num_training_steps: Optimizer steps of the whole run.
        data_rank: This rank among those that read different data.
        data_world_size: Number of those.
        evaluate: False opens the training split only.
        eval_steps: Global batches of one evaluation; `None` takes `class_args.eval_steps`, else
            10 (rows of one length) or the whole split (finetuning).
        seed: `random_args.seed`.
        vocab_size: Of the model; token ids at and above it are refused.
        tokenizer: Needed by text datasets and fill-in-the-middle; gives the end of text.
        reset_attention_mask: Keep packed documents apart.
        reset_position_ids: Restart positions at documents.
        loss_mask: Finetuning: train the answers only, or the prompts too.
        ignore_sampling_proportion_for_validation: Validate every dataset once, in order, instead
            of by ratio.
        pad_to_multiple_of: Finetuning: rows are padded to a multiple of this.
        pin_memory: Page-locked tensors, for copies to a GPU.
        is_endless: Training batches go on after the last step, for a run that leaves some out; an
            order that is made for a number of samples begins again.

    Returns:
        The loaders; evaluation loaders give the same batches each time.

    Raises:
        ValueError: Names the setting, the value, what is allowed and the remedy.
        FileNotFoundError: If a corpus is missing.
    """
    _check_names(datasets)
    eos_token_id = _eos_token_id(datasets, tokenizer)
    context = DataContext(
        seed=seed, tokenizer=tokenizer, vocab_size=vocab_size, eos_token_id=eos_token_id
    )
    opener: Opener
    if tuning_method == "full_finetuning":
        opener = ExampleOpener(
            datasets, context, loss_mask=loss_mask, pad_to_multiple_of=pad_to_multiple_of
        )
    else:
        opener = TokenOpener(
            datasets,
            context,
            reset_attention_mask=reset_attention_mask,
            reset_position_ids=reset_position_ids,
        )
    sizes = BatchSizes(
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        data_rank=data_rank,
        data_world_size=data_world_size,
        num_workers=max(entry.class_args.num_workers for entry in datasets),
        pin_memory=pin_memory,
    )
    num_samples = num_training_steps * global_batch_size
    train = opener.training(num_samples, sizes, is_endless=is_endless)
    steps = _eval_steps(datasets, eval_steps, tuning_method) if evaluate else 0
    once = ignore_sampling_proportion_for_validation
    return Loaders(
        train=train,
        val=opener.evaluation("val", steps, sizes, is_each_once=once),
        test=opener.evaluation("test", steps, sizes, is_each_once=once),
        val_groups=opener.groups("val", steps, sizes),
        test_groups=opener.groups("test", steps, sizes),
        source_names=train.source_names,
        eos_token_id=eos_token_id,
    )


def _check_names(datasets: Sequence[DatasetArgs]) -> None:
    if not datasets:
        raise ValueError("`datasets` is empty: a run needs at least one dataset")
    names = [entry.data_name for entry in datasets]
    if len(set(names)) < len(names):
        raise ValueError(f"`data_name` must differ between datasets, got {names}")
    given = [entry.data_sampling_ratio is not None for entry in datasets]
    if any(given) and not all(given):
        missing = [entry.data_name for entry in datasets if entry.data_sampling_ratio is None]
        raise ValueError(
            f"`data_sampling_ratio` must be given for every dataset or for none, missing: {missing}"
        )


def _eos_token_id(datasets: Sequence[DatasetArgs], tokenizer: TextTokenizer | None) -> int | None:
    """End of text: the tokenizer's, else the one that all manifests agree on."""
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    found = set()
    for entry in datasets:
        for prefix in entry.prefixes() if isinstance(entry, MegatronDatasetArgs) else []:
            manifest = read_manifest(prefix)
            if manifest is not None and manifest.tokenizer is not None:
                found.add(manifest.tokenizer.eos_token_id)
    return found.pop() if len(found) == 1 else None


def _eval_steps(
    datasets: Sequence[DatasetArgs], eval_steps: int | None, tuning_method: str
) -> int | None:
    if eval_steps is not None:
        return eval_steps
    given = [entry.class_args.eval_steps for entry in datasets]
    stated = [steps for steps in given if steps is not None]
    if stated:
        return max(stated)
    return None if tuning_method == "full_finetuning" else DEFAULT_EVAL_STEPS

"""What the sections of a run file must satisfy together, found before any device is touched.

What one section says by itself is checked by its own class; what depends on files and hubs is
checked when the run is composed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lme_cli.config import RunConfig
from lme_cli.problems import Path, Problem
from lme_core.architectures import ModelConfig
from lme_core.training.batch_plan import BatchPlan
from lme_data.dataset import (
    DatasetArgs,
    DebugDatasetArgs,
    HuggingFaceDatasetArgs,
    MegatronDatasetArgs,
    PresetDatasetArgs,
)
from lme_parallel.pipeline.orders import check_schedule
from lme_parallel.topology import Topology


@dataclass(frozen=True, slots=True)
class Finding:
    """One contradiction, or (a warning) one thing that will have no or a surprising effect."""

    path: Path
    """The setting to change."""
    message: str
    """What is wrong, with the values."""
    remedy: str
    """What to do."""
    is_warning: bool = False
    """Whether the run may go on."""

    def problem(self) -> Problem:
        """Give the same without a place."""
        return Problem(self.message, self.path, None, self.remedy)


Find = Callable[[RunConfig], Iterator[Finding]]


@dataclass(frozen=True, slots=True)
class Check:
    """One rule between sections."""

    sections: Sequence[str]
    """Sections it speaks about; in a fragment the rule applies if all of them are written."""
    find: Find


def find_all(run: RunConfig, present: Sequence[str], world_size: int | None) -> list[Finding]:
    """Apply every rule whose sections are present.

    Args:
        run: The sections; for a fragment those missing are not touched.
        present: Names of the sections that rules may speak about.
        world_size: Number of processes; `None` where it is not known, which leaves out the rules
            that depend on it.
    """
    found = [
        finding
        for check in CHECKS
        if set(check.sections) <= set(present)
        for finding in check.find(run)
    ]
    if world_size is not None and "training_parameters" in present:
        found += check_world(run, world_size)
    return found


def check_world(run: RunConfig, world_size: int) -> Iterator[Finding]:
    """Check the layout and the batch arithmetic for a number of processes."""
    try:
        topology = Topology.from_args(run.distributed_args, world_size, 0)
    except ValueError as error:
        yield Finding(("distributed_args",), f"does not fit {world_size} processes: {error}", "")
        return
    path = ("training_parameters",)
    try:
        batch = BatchPlan.resolve(run.training_parameters, topology.data_world_size)
    except ValueError as error:
        yield Finding(path, f"does not fit {world_size} processes: {error}", "")
        return
    try:
        check_schedule(run.distributed_args, batch.gradient_accumulation_steps)
    except ValueError as error:
        yield Finding(path, f"does not fit {world_size} processes: {error}", "")


def _teacher(run: RunConfig) -> Iterator[Finding]:
    method = run.tuning_args.tuning_method
    if method == "distillation" and run.teacher_args is None:
        message = "is required with `tuning_args.tuning_method: distillation`"
        yield Finding(("teacher_args",), message, "name the teacher in `teacher_args.model_name`")
    if method != "distillation" and run.teacher_args is not None:
        message = f"is given, but `tuning_args.tuning_method` is `{method}`"
        remedy = "remove the section or set `tuning_method: distillation`"
        yield Finding(("teacher_args",), message, remedy)


def _datasets(run: RunConfig) -> Iterator[Finding]:
    if not run.datasets:
        yield Finding(("datasets",), "is an empty list", "name at least one dataset")
    seen: dict[str, int] = {}
    for index, dataset in enumerate(run.datasets):
        name = dataset.data_name
        if name in seen:
            message = f"is `{name}`, which `datasets.{seen[name]}.data_name` is too"
            yield Finding(("datasets", index, "data_name"), message, "names must differ")
        seen.setdefault(name, index)
    ratios = [each.data_sampling_ratio for each in run.datasets]
    if len(ratios) > 1 and None in ratios and any(each is not None for each in ratios):
        index = ratios.index(None)
        path = ("datasets", index, "data_sampling_ratio")
        message = "is missing, but other datasets have one"
        yield Finding(path, message, "give every dataset a ratio, or none of them")


def _dataset_kinds(run: RunConfig) -> Iterator[Finding]:
    method = run.tuning_args.tuning_method
    lengths: dict[int, int] = {}
    for index, dataset in enumerate(run.datasets):
        path = ("datasets", index, "class_name")
        kind = dataset.class_name
        if method == "full_finetuning":
            if isinstance(dataset, MegatronDatasetArgs):
                message = f"is `{kind}`, which holds no prompts and answers for full_finetuning"
                yield Finding(path, message, "use `HuggingFaceDataset`, or `pretraining`")
            continue
        if isinstance(dataset, HuggingFaceDatasetArgs | PresetDatasetArgs):
            message = (
                f"is `{kind}`, which holds prompts and answers, but `tuning_method` is {method}"
            )
            remedy = "tokenise it with `lme data tokenize` and use `MegatronDataset`"
            yield Finding(path, message, remedy)
        elif (length := _sequence_length(dataset)) is None:
            full = ("datasets", index, "class_args", "sequence_length")
            yield Finding(full, f"is required for {method}", "give the tokens of a sample")
        else:
            lengths.setdefault(length, index)
    if len(lengths) > 1:
        (first, _), (second, index) = list(lengths.items())[:2]
        path = ("datasets", index, "class_args", "sequence_length")
        yield Finding(path, f"is {second}, but another dataset's is {first}", "make them equal")


def _lengths(run: RunConfig) -> Iterator[Finding]:
    config = run.model_args.pretrained_config
    if config is None or config.position_embedding_type == "nope":
        return
    limit = config.max_position_embeddings
    learned = config.position_embedding_type == "learned_absolute"
    for index, dataset in enumerate(run.datasets):
        length = _sequence_length(dataset)
        if length is None or length <= limit:
            continue
        path = ("datasets", index, "class_args", "sequence_length")
        place = "`model_args.pretrained_config.max_position_embeddings`"
        message = f"is {length}, more than {place} ({limit})"
        if learned:
            message += " learned positions"
        yield Finding(path, message, f"set {place} to {length}", is_warning=not learned)


def _token_ids(run: RunConfig) -> Iterator[Finding]:
    config = run.model_args.pretrained_config
    if config is None:
        return
    for index, dataset in enumerate(run.datasets):
        if not isinstance(dataset, DebugDatasetArgs):
            continue
        token = dataset.class_args.token_id
        if token is not None and token >= config.vocab_size:
            path = ("datasets", index, "class_args", "token_id")
            message = f"is {token}, but `model_args.pretrained_config.vocab_size` is"
            yield Finding(path, f"{message} {config.vocab_size}", "use a smaller id")


def _tokenizer(run: RunConfig) -> Iterator[Finding]:
    needs_text = run.tuning_args.tuning_method == "full_finetuning" and any(
        isinstance(each, HuggingFaceDatasetArgs | PresetDatasetArgs) for each in run.datasets
    )
    named = run.tokenizer_args.tokenizer_name or run.model_args.model_name
    if needs_text and not named:
        message = "is required to finetune a new model on text"
        yield Finding(("tokenizer_args", "tokenizer_name"), message, "name a tokenizer")


def _tensor_parallel(run: RunConfig) -> Iterator[Finding]:
    config, size = run.model_args.pretrained_config, run.distributed_args.tensor_parallel_world_size
    if config is None or size == 1:
        return
    bad = [f"`{name}` ({number})" for name, number in _divisible(config) if number % size]
    if bad:
        path = ("distributed_args", "tensor_parallel_world_size")
        message = f"is {size}, which does not divide {', '.join(bad)}"
        yield Finding(path, message, "use a number that divides them")


def _divisible(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Give what tensor parallelism cuts, each once."""
    seen: set[tuple[str, int]] = set()
    for block in (*config.mixers(), *config.mlps()):
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            # Kinds of blocks have different settings.
            number = getattr(block, name, None)
            if isinstance(number, int) and (name, number) not in seen:
                seen.add((name, number))
                yield name, number


def _pipeline(run: RunConfig) -> Iterator[Finding]:
    stages = run.distributed_args.num_pipeline_stages
    path = ("distributed_args", "num_pipeline_stages")
    config = run.model_args.pretrained_config
    if config is not None and stages > config.num_layers:
        message = f"is {stages}, more than `num_layers` ({config.num_layers})"
        yield Finding(path, message, f"use at most {config.num_layers}")


def _pipeline_schedule(run: RunConfig) -> Iterator[Finding]:
    try:
        check_schedule(run.distributed_args)
    except ValueError as error:
        path = ("distributed_args", "pipeline_parallel_schedule")
        yield Finding(path, f"does not work: {error}", "")


def _pipeline_teacher(run: RunConfig) -> Iterator[Finding]:
    size = run.distributed_args.pipeline_parallel_world_size
    if size > 1 and run.tuning_args.tuning_method == "distillation":
        message = f"is {size}, but distillation compares logits, which one stage has"
        path = ("distributed_args", "pipeline_parallel_world_size")
        yield Finding(path, message, "use 1 with `tuning_method: distillation`")


def _split_sequences(run: RunConfig) -> Iterator[Finding]:
    args = run.distributed_args
    # Context parallelism pads what does not divide.
    if not args.sequence_parallel or args.context_parallel_world_size > 1:
        return
    factor = args.tensor_parallel_world_size
    for index, dataset in enumerate(run.datasets):
        length = _sequence_length(dataset)
        if length is not None and length % factor:
            path = ("datasets", index, "class_args", "sequence_length")
            message = f"is {length}, but the layout cuts sequences into {factor} equal parts"
            yield Finding(path, message, f"use a multiple of {factor}")


def _whole_teacher(run: RunConfig) -> Iterator[Finding]:
    size = run.distributed_args.context_parallel_world_size
    if size > 1 and run.tuning_args.tuning_method == "distillation":
        message = f"is {size}, but a teacher needs whole sequences"
        path = ("distributed_args", "context_parallel_world_size")
        yield Finding(path, message, "use 1 with `tuning_method: distillation`")


def _batch(run: RunConfig) -> Iterator[Finding]:
    """Check what no number of processes could make right."""
    sizes = run.training_parameters
    known = [each for each in (sizes.micro_batch_size, sizes.gradient_accumulation_steps) if each]
    total = sizes.global_batch_size
    if total is not None and total % math.prod(known):
        product = " * ".join(map(str, known))
        message = f"is {total}, not a multiple of micro batch and accumulation ({product})"
        path = ("training_parameters", "global_batch_size")
        yield Finding(path, message, "correct one of the three, or leave one out")


def _schedule(run: RunConfig) -> Iterator[Finding]:
    steps = run.training_parameters.num_training_steps
    args = run.lr_scheduler_args
    before = args.num_warmup_steps + args.num_constant_steps
    if before > steps:
        message = f"and `num_constant_steps` are {before} steps, more than the run's {steps}"
        remedy = "the learning rate will not reach its value or not decay; use fewer"
        path = ("lr_scheduler_args", "num_warmup_steps")
        yield Finding(path, message, remedy, is_warning=True)


def _intervals(run: RunConfig) -> Iterator[Finding]:
    steps, interval = run.training_parameters.num_training_steps, run.save_args.save_interval
    if interval > steps:
        message = f"is {interval}, more than the run's {steps} steps"
        remedy = "it is saved once, at the end"
        yield Finding(("save_args", "save_interval"), message, remedy, is_warning=True)


def _rewind(run: RunConfig) -> Iterator[Finding]:
    if run.training_parameters.bad_step_policy == "rewind" and not run.save_args.save_optimizer:
        message = "is false, but `training_parameters.bad_step_policy` is `rewind`"
        remedy = "save the optimizer's state too, or a run that went back starts it afresh"
        yield Finding(("save_args", "save_optimizer"), message, remedy)


def _sequence_length(dataset: DatasetArgs) -> int | None:
    if isinstance(dataset, MegatronDatasetArgs | DebugDatasetArgs):
        return dataset.class_args.sequence_length
    return None


CHECKS: Sequence[Check] = (
    Check(("tuning_args", "teacher_args"), _teacher),
    Check(("tuning_args", "distributed_args"), _whole_teacher),
    Check(("datasets",), _datasets),
    Check(("datasets", "tuning_args"), _dataset_kinds),
    Check(("datasets", "model_args"), _lengths),
    Check(("datasets", "model_args"), _token_ids),
    Check(("datasets", "model_args", "tuning_args", "tokenizer_args"), _tokenizer),
    Check(("model_args", "distributed_args"), _tensor_parallel),
    Check(("model_args", "distributed_args"), _pipeline),
    Check(("distributed_args",), _pipeline_schedule),
    Check(("tuning_args", "distributed_args"), _pipeline_teacher),
    Check(("datasets", "distributed_args"), _split_sequences),
    Check(("training_parameters",), _batch),
    Check(("training_parameters", "lr_scheduler_args"), _schedule),
    Check(("training_parameters", "save_args"), _intervals),
    Check(("training_parameters", "save_args"), _rewind),
)
"""Every rule, in the order in which findings are shown."""

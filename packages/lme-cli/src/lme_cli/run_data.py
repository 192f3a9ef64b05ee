"""What a run reads: its loaders, its vocabulary, its evaluation batches."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from lme_cli.planning import Plan
from lme_cli.run_tokenizer import bytes_per_target
from lme_core.training.evaluation import EvaluationSet
from lme_data.build import Loaders, build_loaders
from lme_data.tokenizer import TextTokenizer


def open_data(plan: Plan, tokenizer: TextTokenizer | None) -> Loaders:
    """Open the datasets of the run file."""
    run = plan.run
    parameters = run.training_parameters
    return build_loaders(
        run.datasets,
        tuning_method=run.tuning_args.tuning_method,
        micro_batch_size=plan.batch.micro_batch_size,
        global_batch_size=plan.batch.global_batch_size,
        num_training_steps=parameters.num_training_steps,
        data_rank=plan.topology.data_rank,
        data_world_size=plan.topology.data_world_size,
        evaluate=parameters.eval_during_training,
        seed=run.random_args.seed,
        vocab_size=plan.model_config.vocab_size,
        tokenizer=tokenizer,
        reset_attention_mask=run.model_args.reset_attention_mask,
        reset_position_ids=run.model_args.reset_position_ids,
        loss_mask=parameters.loss_mask,
        ignore_sampling_proportion_for_validation=(
            parameters.ignore_sampling_proportion_for_validation
        ),
        # A run that goes back leaves out data, and needs others in their place.
        is_endless=parameters.bad_step_policy == "rewind",
    )


def check_vocabulary(plan: Plan, tokenizer: TextTokenizer | None) -> None:
    """Refuse a tokenizer with more ids than the model has embeddings.

    Raises:
        ValueError: Naming both settings.
    """
    size = plan.model_config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > size:
        raise ValueError(
            f"`tokenizer_args.tokenizer_name` {tokenizer.name} has {tokenizer.vocab_size} ids, but "
            f"`model_args.pretrained_config.vocab_size` is {size}; set it to at least "
            f"{tokenizer.vocab_size}"
        )


def evaluation_sets(
    loaders: Loaders, tokenizer: TextTokenizer | None, names: Iterable[str] = ("val", "test")
) -> list[EvaluationSet]:
    """Name the evaluation batches of a run for the hooks and for `lme evaluate`."""
    sets: list[EvaluationSet] = []
    for name, whole, groups in (
        ("val", loaders.val, loaders.val_groups),
        ("test", loaders.test, loaders.test_groups),
    ):
        for group, batches in {None: whole, **groups}.items():
            if batches is not None and name in names:
                size = bytes_per_target(batches, tokenizer)
                sets.append(_evaluation_set(name, batches, group, size))
    return sets


def _evaluation_set(
    name: str, batches: Iterable[Mapping[str, Tensor]], group: str | None, size: float | None
) -> EvaluationSet:
    context = "val" if name == "val" else "test"
    return EvaluationSet(context=context, batches=batches, group=group, bytes_per_target=size)

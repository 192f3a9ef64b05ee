"""The run file's sections about the model, the method, the batch and the precision."""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from lme_core.config import ModelConfig

Precision = Literal["fp32", "float32", "fp16", "float16", "bf16", "bfloat16", "fp8", "float8"]

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


class NoEffectWarning(UserWarning):
    """A setting was accepted for compatibility and changes nothing."""


def warn_no_effect(setting: str, reason: str) -> None:
    """Say that a setting of the run file has no effect here, and why.

    Args:
        setting: The setting as the user writes it, `section.key`.
        reason: A clause that follows "has no effect: ".
    """
    # Past this function, `__post_init__` and the generated `__init__`.
    warnings.warn(f"`{setting}` has no effect: {reason}", NoEffectWarning, stacklevel=4)


def parse_dtype(setting: str, name: str) -> torch.dtype:
    """Translate a spelling of a floating point type.

    Args:
        setting: The setting that holds it, for the error.
        name: fp32, fp16, bf16 or their long forms.

    Returns:
        The torch dtype.

    Raises:
        ValueError: If the name is unknown, or is fp8, which is not supported.
    """
    if name in ("fp8", "float8"):
        raise ValueError(
            f"`{setting}` is {name}: 8-bit training needs scaled matrix products that no op here "
            "has yet; use bf16"
        )
    if name not in _DTYPES:
        raise ValueError(f"`{setting}` must be one of {', '.join(_DTYPES)}; got {name}")
    return _DTYPES[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArgs:
    """Which model is trained: an existing one by name, or a new one from its architecture."""

    model_name: str | None = None
    """Model directory or hub name to start from. Exclusive with `pretrained_config`."""
    pretrained_config: ModelConfig | None = None
    """Architecture of a new model, with its `model_type`. Exclusive with `model_name`."""
    trust_remote_code: bool = False
    """Only false is accepted: no code that comes with a model is ever run."""
    use_padding_free_transformer: bool = False
    """No effect: packed rows always run without padding."""
    efficient_initialization: bool = False
    """No effect: every model is built without memory and initialised shard by shard."""
    reset_attention_mask: bool = False
    """Keep documents of a row apart: no token attends across an end-of-text token."""
    reset_position_ids: bool = False
    """Positions restart at each document. Needs `reset_attention_mask`."""

    def __post_init__(self) -> None:
        if (self.model_name is None) == (self.pretrained_config is None):
            given = "neither" if self.model_name is None else "both"
            raise ValueError(
                "exactly one of `model_args.model_name` and `model_args.pretrained_config` must "
                f"be given, got {given}"
            )
        if self.trust_remote_code:
            raise ValueError(
                "`model_args.trust_remote_code` must be false: this system never runs code that "
                "comes with a model; convert the model with `lme convert import` instead"
            )
        if self.reset_position_ids and not self.reset_attention_mask:
            raise ValueError(
                "`model_args.reset_position_ids` needs `model_args.reset_attention_mask: true`: "
                "without it documents attend to each other and their positions would collide"
            )
        if self.use_padding_free_transformer:
            warn_no_effect(
                "model_args.use_padding_free_transformer", "packed rows never hold padding"
            )
        if self.efficient_initialization:
            warn_no_effect(
                "model_args.efficient_initialization",
                "models are always built without memory and initialised shard by shard",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningArgs:
    """What the run does to the model."""

    tuning_method: Literal["pretraining", "full_finetuning", "distillation"]
    """Objective: next-token prediction, the same on chosen tokens, or a teacher's distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingParameters:
    """How long and on how much at once the model is trained, and when it is evaluated."""

    num_training_steps: int
    """Optimizer steps of the whole run."""
    micro_batch_size: int | None = None
    """Sequences a data-parallel replica runs at once; null: from the other two sizes."""
    gradient_accumulation_steps: int | None = None
    """Micro batches per optimizer step; null: from the other two sizes, 1 if only one is given."""
    global_batch_size: int | None = None
    """Sequences per optimizer step over all replicas; null: product of the others."""
    eval_during_training: bool = True
    """Evaluate on the validation split (and once on the test split at the end)."""
    eval_interval: int | None = None
    """Optimizer steps between evaluations; null: at the end only."""
    loss_mask: Literal["output_only", "no_mask"] = "output_only"
    """Which tokens are targets in finetuning: the answer's, or the prompt's too."""
    gradient_clipping: float | None = 1.0
    """Largest global gradient norm; null: no clipping."""
    ignore_sampling_proportion_for_validation: bool = False
    """Validate on each data set once and in order instead of in the mixture's proportions."""
    bad_step_policy: Literal["skip", "raise", "rewind"] = "skip"
    """After a step whose loss or gradient is not finite, or is a spike: leave it out and go on; end
    the run; or go back to the last checkpoint and go on from there with the data after that step's
    batch. It is never applied, and its batch is recorded in the run's directory."""
    max_rewinds: int = 3
    """How often a run with `bad_step_policy: rewind` may go back; the next bad step ends it."""
    spike_sigmas: float | None = None
    """A loss so many standard deviations above its running mean is a spike; null: none is."""
    stop_after_seconds: float | None = None
    """Wall-clock budget: after it the run saves and ends with exit code 0; null: none."""

    def __post_init__(self) -> None:
        for name, value in (
            ("num_training_steps", self.num_training_steps),
            ("micro_batch_size", self.micro_batch_size),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps),
            ("global_batch_size", self.global_batch_size),
            ("eval_interval", self.eval_interval),
            ("max_rewinds", self.max_rewinds),
        ):
            if value is not None and value < 1:
                raise ValueError(f"`training_parameters.{name}` must be at least 1, got {value}")
        if self.micro_batch_size is None and (
            self.gradient_accumulation_steps is None or self.global_batch_size is None
        ):
            raise ValueError(
                "`training_parameters` does not determine the batch: give `micro_batch_size`, or "
                "both `gradient_accumulation_steps` and `global_batch_size`"
            )
        for name, limit in (
            ("gradient_clipping", self.gradient_clipping),
            ("stop_after_seconds", self.stop_after_seconds),
            ("spike_sigmas", self.spike_sigmas),
        ):
            if limit is not None and not limit > 0:
                raise ValueError(
                    f"`training_parameters.{name}` must be above 0, or null for none; got {limit}"
                )
        if self.eval_interval is not None and not self.eval_during_training:
            warn_no_effect("training_parameters.eval_interval", "`eval_during_training` is false")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPrecisionArgs:
    """In which floating point type the model computes. Parameters are kept and saved in fp32."""

    dtype: Precision = "fp32"
    """Type of the copy that computes: fp32, bf16 or fp16 (with a loss scaler)."""
    tf32: bool = False
    """Let fp32 matrix products on NVIDIA GPUs round their inputs to 10 mantissa bits."""
    scaling_type_input: str = "dynamic"
    """Of fp8, which is refused: no effect."""
    scaling_type_weight: str = "dynamic"
    """Of fp8, which is refused: no effect."""
    scaling_type_grad_output: str = "dynamic"
    """Of fp8, which is refused: no effect."""

    def __post_init__(self) -> None:
        parse_dtype("mixed_precision_args.dtype", self.dtype)
        for name, value in (
            ("scaling_type_input", self.scaling_type_input),
            ("scaling_type_weight", self.scaling_type_weight),
            ("scaling_type_grad_output", self.scaling_type_grad_output),
        ):
            if value != "dynamic":
                warn_no_effect(f"mixed_precision_args.{name}", "8-bit training is not supported")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the copy that computes."""
        return parse_dtype("mixed_precision_args.dtype", self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomArgs:
    """What random numbers are derived from."""

    seed: int = 42
    """Of initial values, dropout and data order; any integer of 64 bits."""

    def __post_init__(self) -> None:
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"`random_args.seed` must fit 64 bits, got {self.seed}")

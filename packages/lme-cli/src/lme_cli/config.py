"""The run file as a type: the sections are named here and owned by the packages that act on them.

Every depth refuses unknown keys; everything is frozen.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Discriminator, Field

from lme_core.training.args import (
    MixedPrecisionArgs,
    ModelArgs,
    RandomArgs,
    TrainingParameters,
    TuningArgs,
)
from lme_core.training.logging_args import LoggingArgs
from lme_core.training.optimizer_args import OptimizerArgs, TorchAdamWArgs
from lme_core.training.schedules import LRSchedulerArgs
from lme_core.training.teacher_args import TeacherArgs
from lme_data.dataset import DatasetArgs
from lme_data.tokenizer import TokenizerArgs
from lme_kernels.policy import KernelArgs
from lme_parallel.args import DistributedArgs
from lme_parallel.checkpoint.args import LoadArgs, SaveArgs

_STRICT = ConfigDict(
    extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
)


class RunConfig(BaseModel):
    """A training run."""

    model_config = _STRICT

    random_args: RandomArgs = Field(default_factory=RandomArgs)
    """What random numbers are derived from."""
    tokenizer_args: TokenizerArgs = Field(default_factory=TokenizerArgs)
    """Which tokenizer the data was made with."""
    model_args: ModelArgs
    """Which model is trained: a new one from its architecture, or an existing one by name."""
    tuning_args: TuningArgs
    """What is done to the model."""
    optimizer_args: OptimizerArgs = Field(default_factory=TorchAdamWArgs)
    """Which optimizer, with which arguments."""
    lr_scheduler_args: LRSchedulerArgs = Field(default_factory=LRSchedulerArgs)
    """The learning rate over the run."""
    datasets: list[Annotated[DatasetArgs, Discriminator("class_name")]]
    """What it is trained on; at least one."""
    save_args: SaveArgs
    """Where and how often the run is saved."""
    load_args: LoadArgs | None = None
    """Which other run to start from; null: none. A checkpoint in `save_path` wins over it."""
    training_parameters: TrainingParameters
    """How long, on how much at once, and when it is evaluated."""
    logging_args: LoggingArgs = Field(default_factory=LoggingArgs)
    """What is logged, how often and where to."""
    mixed_precision_args: MixedPrecisionArgs = Field(default_factory=MixedPrecisionArgs)
    """In which floating point type the model computes."""
    distributed_args: DistributedArgs = Field(default_factory=DistributedArgs)
    """How the model is spread over processes, recomputed and compiled."""
    kernel_args: KernelArgs = Field(default_factory=KernelArgs)
    """Which fused kernels are used; absent: the fastest proven ones."""
    teacher_args: TeacherArgs | None = None
    """Whom a distilled model learns from; required with, and only with, distillation."""


class UnshardConfig(BaseModel):
    """From a checkpoint to a model directory."""

    model_config = _STRICT

    load_args: LoadArgs
    """Which run and which of its checkpoints."""
    unsharded_path: str
    """Where the model directory is written."""
    mixed_precision_args: MixedPrecisionArgs = Field(default_factory=MixedPrecisionArgs)
    """The floating point type it is written in."""
    logging_args: LoggingArgs = Field(default_factory=LoggingArgs)
    """What is logged."""
    kernel_args: KernelArgs = Field(default_factory=KernelArgs)
    """No effect: nothing is computed."""

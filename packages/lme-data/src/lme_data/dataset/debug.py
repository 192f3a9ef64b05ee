"""Made-up tokens, to try a run without data."""

from dataclasses import dataclass
from typing import Literal

from lme_data.dataset.base import check_entry


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugClassArgs:
    """Settings of a DebugDataset."""

    num_examples: int
    """Examples of an epoch."""
    token_id: int | None = None
    """The token every static example is made of; absent: the end-of-text token, else 0."""
    static_examples: bool = True
    """All examples alike; false: example i differs from every other."""
    sequence_length: int | None = None
    """Tokens of a pretraining sample; required for pretraining."""
    eval_steps: int | None = None
    """Global batches of one evaluation; absent: 10."""
    num_workers: int = 0
    """Threads that prepare batches ahead; 0 prepares them when asked."""

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            raise ValueError(f"`num_examples` must be at least 1, got {self.num_examples}")
        if self.token_id is not None and self.token_id < 0:
            raise ValueError(f"`token_id` must be 0 or more, got {self.token_id}")
        if self.sequence_length is not None and self.sequence_length < 1:
            raise ValueError(f"`sequence_length` must be at least 1, got {self.sequence_length}")
        if self.eval_steps is not None and self.eval_steps < 0:
            raise ValueError(f"`eval_steps` must be 0 or more, got {self.eval_steps}")
        if self.num_workers < 0:
            raise ValueError(f"`num_workers` must be 0 or more, got {self.num_workers}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugDatasetArgs:
    """Made-up tokens, for pretraining (with `sequence_length`) and finetuning."""

    class_name: Literal["DebugDataset"] = "DebugDataset"
    """Kind of the dataset."""
    data_name: str
    """Name of the dataset in metrics; unique in the list."""
    class_args: DebugClassArgs
    """What the examples look like."""
    data_sampling_ratio: float | None = None
    """Share of the mixture where several datasets are given; any positive number."""
    input_format: str = "__input__"
    """Must be left as it is: there is no text."""
    output_format: str = "__output__"
    """Must be left as it is: there is no text."""
    max_input_tokens: int | None = None
    """Tokens of a finetuning prompt; required for finetuning."""
    max_output_tokens: int | None = None
    """Tokens of a finetuning answer, its end-of-text token included; required for finetuning."""

    def __post_init__(self) -> None:
        limits = {
            "max_input_tokens": self.max_input_tokens,
            "max_output_tokens": self.max_output_tokens,
        }
        check_entry(self.data_name, self.data_sampling_ratio, limits)
        if (self.input_format, self.output_format) != ("__input__", "__output__"):
            raise ValueError(
                f"`input_format` and `output_format` of `{self.data_name}` must be left out: "
                "`DebugDataset` has no text"
            )

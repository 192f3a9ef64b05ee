"""Well-known instruction datasets under their names: prompts fixed, columns known."""

from dataclasses import dataclass
from typing import Literal

from lme_data.dataset.base import check_entry


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetClassArgs:
    """Settings of a dataset whose columns and prompt are known."""

    data_path: str | None = None
    """A local copy (file or folder); absent: the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    eval_steps: int | None = None
    """Global batches of one evaluation; absent: the whole split."""
    seed: int | None = None
    """Seed of the order of examples; absent: `random_args.seed`."""
    num_workers: int = 2
    """Threads that prepare batches ahead; 0 prepares them when asked. Never changes the order."""

    def __post_init__(self) -> None:
        if self.eval_steps is not None and self.eval_steps < 0:
            raise ValueError(f"`eval_steps` must be 0 or more, got {self.eval_steps}")
        if self.num_workers < 0:
            raise ValueError(f"`num_workers` must be 0 or more, got {self.num_workers}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetDatasetArgs:
    """Alpaca, Dolly and SlimOrca (training split only) and SST-2."""

    class_name: Literal["AlpacaDataset", "DollyDataset", "SlimOrcaDataset", "SST2Dataset"]
    """Which dataset."""
    data_name: str
    """Name of the dataset in metrics; unique in the list."""
    class_args: PresetClassArgs = PresetClassArgs()
    """Where it is, if not on the hub."""
    data_sampling_ratio: float | None = None
    """Share of the mixture where several datasets are given; any positive number."""
    input_format: str = "__input__"
    """Must be left as it is, except for SST-2: the prompt is the dataset's own."""
    output_format: str = "__output__"
    """Answer as it is tokenised; the first `__output__` is replaced by the dataset's answer."""
    max_input_tokens: int | None = None
    """Longest prompt in tokens, the rest is cut; absent: no limit."""
    max_output_tokens: int | None = None
    """Longest answer in tokens, its end-of-text token included; absent: no limit."""

    def __post_init__(self) -> None:
        limits = {
            "max_input_tokens": self.max_input_tokens,
            "max_output_tokens": self.max_output_tokens,
        }
        check_entry(self.data_name, self.data_sampling_ratio, limits)
        if self.class_name != "SST2Dataset" and self.input_format != "__input__":
            raise ValueError(
                f"`input_format` of `{self.data_name}` must be left out: "
                f"`{self.class_name}` brings its own prompt"
            )

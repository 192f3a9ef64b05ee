"""Tokenised text on disk as samples of one length: `.bin/.idx` files, blended and shuffled."""

from dataclasses import dataclass
from typing import Literal

from lme_data.dataset.base import check_entry, check_no_text_settings
from lme_data.paths import parse_blend


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronClassArgs:
    """Settings of a MegatronDataset: which files, how they are split, in what order."""

    sequence_length: int
    """Tokens of a training sample; one more is read, for the last label."""
    eval_steps: int | None = None
    """Global batches of one evaluation; absent: 10."""
    data_path: str | list[str | float] | None = None
    """Prefix of a `.bin/.idx` pair, a list of prefixes, or alternating weight and prefix."""
    split: str | float | None = None
    """Shares of train, validation and test, as in `98,1,1`; required with `data_path`."""
    train_data_path: str | list[str | float] | None = None
    """As `data_path`, for training only; with any of the three, `split` has no effect."""
    val_data_path: str | list[str | float] | None = None
    """As `data_path`, for validation only."""
    test_data_path: str | list[str | float] | None = None
    """As `data_path`, for the test split only."""
    data_cache_path: str | None = None
    """Folder where sample indices are kept; absent: they are rebuilt in memory at each start."""
    fim_rate: float = 0.0
    """Probability that a document is rearranged for fill-in-the-middle, 0 to 1."""
    fim_spm_rate: float = 0.5
    """Share of the rearranged documents in suffix-prefix-middle order, 0 to 1."""
    node_uses_local_storage: bool = False
    """Accepted for older run files; every process builds the index it lacks."""
    seed: int | None = None
    """Seed of document and sample order; absent: `random_args.seed`."""
    num_workers: int = 2
    """Threads that prepare batches ahead; 0 prepares them when asked. Never changes the order."""
    order: Literal["megatron", "stable"] = "megatron"
    """`megatron`: the field's order, which depends on steps and batch size; `stable`: does not."""
    val_weighted_split_paths: list[dict[str, list[str | float]]] | None = None
    """Validation groups: name of the group to its blend; reported one by one."""

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ValueError(f"`sequence_length` must be at least 1, got {self.sequence_length}")
        if self.eval_steps is not None and self.eval_steps < 0:
            raise ValueError(f"`eval_steps` must be 0 or more, got {self.eval_steps}")
        if self.num_workers < 0:
            raise ValueError(f"`num_workers` must be 0 or more, got {self.num_workers}")
        for setting, rate in (("fim_rate", self.fim_rate), ("fim_spm_rate", self.fim_spm_rate)):
            if not 0 <= rate <= 1:
                raise ValueError(f"`{setting}` must lie between 0 and 1, got {rate}")
        self._check_paths()

    def _check_paths(self) -> None:
        per_split = {
            "train_data_path": self.train_data_path,
            "val_data_path": self.val_data_path,
            "test_data_path": self.test_data_path,
        }
        given = [setting for setting, path in per_split.items() if path is not None]
        if self.data_path is not None and given:
            raise ValueError(
                f"`data_path` and `{given[0]}` exclude each other: "
                "give one corpus with `split`, or one corpus per split"
            )
        if self.data_path is None and not given:
            raise ValueError(
                "`data_path` is missing: give a prefix of `.bin/.idx` files with `split`, "
                "or `train_data_path`, `val_data_path` and `test_data_path`"
            )
        if self.data_path is not None and self.split is None:
            raise ValueError("`split` is required with `data_path`, for example `98,1,1`")
        for setting, path in {"data_path": self.data_path, **per_split}.items():
            if path is not None:
                parse_blend(path, setting)


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronDatasetArgs:
    """Tokens in `.bin/.idx` files, for pretraining and distillation."""

    class_name: Literal["MegatronDataset"] = "MegatronDataset"
    """Kind of the dataset."""
    data_name: str
    """Name of the dataset in metrics; unique in the list."""
    class_args: MegatronClassArgs
    """Which files, how they are split, in what order."""
    data_sampling_ratio: float | None = None
    """Share of the mixture where several datasets are given; any positive number."""
    input_format: str = "__input__"
    """No meaning here: the files hold tokens."""
    output_format: str = "__output__"
    """No meaning here: the files hold tokens."""
    max_input_tokens: int | None = None
    """No meaning here: `sequence_length` decides."""
    max_output_tokens: int | None = None
    """No meaning here: `sequence_length` decides."""

    def __post_init__(self) -> None:
        check_entry(self.data_name, self.data_sampling_ratio, {})
        check_no_text_settings(
            self.class_name,
            self.data_name,
            input_format=self.input_format,
            output_format=self.output_format,
            max_tokens={
                "max_input_tokens": self.max_input_tokens,
                "max_output_tokens": self.max_output_tokens,
            },
        )

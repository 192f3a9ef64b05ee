"""Text examples of prompt and answer, for finetuning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lme_data.context import DataContext, SplitName
from lme_data.dataset.base import check_entry
from lme_data.example_files import read_rows
from lme_data.examples import tokenize_examples
from lme_data.rows import ExampleSource


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceClassArgs:
    """Settings of a HuggingFaceDataset: where it is and which columns are used."""

    data_path: str
    """A json, jsonl or parquet file, a folder of them, or the name of a dataset on the hub."""
    input_key: str = "input"
    """Column of the prompt."""
    output_key: str = "output"
    """Column of the answer."""
    eval_steps: int | None = None
    """Global batches of one evaluation; absent: the whole split."""
    config_name: str | None = None
    """Configuration of a hub dataset that has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    seed: int | None = None
    """Seed of the order of examples; absent: `random_args.seed`."""
    num_workers: int = 2
    """Threads that prepare batches ahead; 0 prepares them when asked. Never changes the order."""

    def __post_init__(self) -> None:
        if not self.data_path:
            raise ValueError("`data_path` must not be empty")
        if self.eval_steps is not None and self.eval_steps < 0:
            raise ValueError(f"`eval_steps` must be 0 or more, got {self.eval_steps}")
        if self.num_workers < 0:
            raise ValueError(f"`num_workers` must be 0 or more, got {self.num_workers}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceDatasetArgs:
    """Prompt and answer columns of a local file or a hub dataset."""

    class_name: Literal["HuggingFaceDataset"] = "HuggingFaceDataset"
    """Kind of the dataset."""
    data_name: str
    """Name of the dataset in metrics; unique in the list."""
    class_args: HuggingFaceClassArgs
    """Where the dataset is and which columns are used."""
    data_sampling_ratio: float | None = None
    """Share of the mixture where several datasets are given; any positive number."""
    input_format: str = "__input__"
    """Prompt as it is tokenised; the first `__input__` is replaced by the column's text."""
    output_format: str = "__output__"
    """Answer as it is tokenised; the first `__output__` is replaced by the column's text."""
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

    def open_examples(self, split: SplitName, context: DataContext) -> ExampleSource | None:
        """Read and tokenise one split.

        Args:
            split: Which; training examples are shuffled, the others keep their order.
            context: Gives seed, tokenizer and vocabulary.

        Returns:
            `None` if the dataset has no such split.

        Raises:
            ValueError: If the dataset cannot be read, or lacks a column; says which it has.
        """
        args = self.class_args
        rows = read_rows(
            args.data_path, split, config_name=args.config_name, revision=args.revision
        )
        if rows is None:
            return None
        seed = context.seed if args.seed is None else args.seed
        return tokenize_examples(
            self.data_name,
            columns(rows, args.input_key, args.output_key, args.data_path),
            context,
            input_format=self.input_format,
            output_format=self.output_format,
            max_input_tokens=self.max_input_tokens,
            max_output_tokens=self.max_output_tokens,
            seed=seed if split == "train" else None,
        )


def columns(
    rows: Sequence[Mapping[str, object]], input_key: str, output_key: str, where: str
) -> list[tuple[str, str]]:
    """Take prompt and answer out of rows.

    Args:
        rows: By column.
        input_key: Column of the prompt.
        output_key: Column of the answer.
        where: Of the dataset, for errors.

    Raises:
        ValueError: If a row lacks a column or holds no text there.
    """
    texts = []
    for number, row in enumerate(rows):
        for setting, key in (("input_key", input_key), ("output_key", output_key)):
            if not isinstance(row.get(key), str):
                raise ValueError(
                    f"`{setting}` {key!r}: row {number} of {where} has no text there; "
                    f"its columns are {sorted(row)}"
                )
        texts.append((str(row[input_key]), str(row[output_key])))
    return texts

"""Well-known instruction datasets under their names: prompts fixed, columns known."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lme_data.context import DataContext, SplitName
from lme_data.dataset.base import check_entry
from lme_data.example_files import read_rows
from lme_data.examples import tokenize_examples
from lme_data.rows import ExampleSource

_HUB_NAMES = {
    "AlpacaDataset": "tatsu-lab/alpaca",
    "DollyDataset": "databricks/databricks-dolly-15k",
    "SlimOrcaDataset": "Open-Orca/SlimOrca-Dedup",
    "SST2Dataset": "sst2",
}


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

    def open_examples(self, split: SplitName, context: DataContext) -> ExampleSource | None:
        """Read and tokenise one split.

        Args:
            split: Which; all but SST-2 have a training split only.
            context: Gives seed, tokenizer and vocabulary.

        Returns:
            `None` if the dataset has no such split.

        Raises:
            ValueError: If the dataset cannot be read or its rows are not what they should be.
        """
        if split != "train" and self.class_name != "SST2Dataset":
            return None
        args = self.class_args
        where = args.data_path or _HUB_NAMES[self.class_name]
        rows = read_rows(where, split, revision=args.revision)
        if rows is None:
            return None
        seed = context.seed if args.seed is None else args.seed
        try:
            texts = [example_texts(self.class_name, row) for row in rows]
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{where} does not look like `{self.class_name}`: {type(error).__name__} {error}; "
                f"the columns of its first row are {sorted(rows[0])}"
            ) from error
        return tokenize_examples(
            self.data_name,
            texts,
            context,
            input_format=self.input_format,
            output_format=self.output_format,
            max_input_tokens=self.max_input_tokens,
            max_output_tokens=self.max_output_tokens,
            seed=seed if split == "train" else None,
        )


def example_texts(class_name: str, row: Mapping[str, object]) -> tuple[str, str]:
    """Prompt and answer of one row of a well-known dataset.

    Args:
        class_name: Which dataset.
        row: By column.
    """
    if class_name == "SST2Dataset":
        return str(row["sentence"]), ("negative", "positive")[int(str(row["label"]))]
    if class_name == "SlimOrcaDataset":
        turns = row["conversations"]
        if not isinstance(turns, list):
            raise TypeError("`conversations` is no list")
        texts = {turn["from"]: turn["value"] for turn in turns}
        return _prompt(texts["human"], texts.get("system", "")), texts["gpt"]
    if class_name == "DollyDataset":
        return _prompt(row["instruction"], row["context"]), str(row["response"])
    return _prompt(row["instruction"], row["input"]), str(row["output"])


def _prompt(instruction: object, further: object) -> str:
    middle = f"input: {further}\n" if further else ""
    return f"{instruction}\n\n{middle}output:"

"""Opening the entries of a run file split by split, and mixing them."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from lme_data.collate import Collate, ExampleCollator, TokenCollator
from lme_data.context import DataContext, SplitName
from lme_data.dataset import (
    DatasetArgs,
    DebugDatasetArgs,
    HuggingFaceDatasetArgs,
    MegatronDatasetArgs,
    PresetDatasetArgs,
)
from lme_data.loader import EvaluationLoader, Loader
from lme_data.mixture import ExampleMixture, TokenMixture
from lme_data.rows import ExampleSource, RowSource, TokenSource
from lme_data.splits import blend_sizes

logger = logging.getLogger(__name__)

Source = TypeVar("Source", bound=RowSource)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSizes:
    """How batches are cut, for every loader of a run."""

    micro_batch_size: int
    """Rows of a batch of one rank."""
    global_batch_size: int
    """Rows of a step over all ranks."""
    data_rank: int
    """This rank among those that read different data."""
    data_world_size: int
    """Number of those."""
    num_workers: int
    """Threads that prepare batches ahead."""
    pin_memory: bool
    """Page-locked tensors."""


class Opener(ABC, Generic[Source]):
    """Opens all entries of a split as one order of samples.

    Args:
        datasets: Entries of the run file.
        context: What the run tells them.
    """

    def __init__(self, datasets: Sequence[DatasetArgs], context: DataContext) -> None:
        self._datasets = list(datasets)
        self._context = context

    @abstractmethod
    def open_split(
        self, split: SplitName, num_samples: int | None
    ) -> list[tuple[DatasetArgs, Source]]:
        """Open every entry that has the split, for `num_samples` of the mixture."""

    @abstractmethod
    def mix(self, sources: Sequence[Source], weights: Sequence[float]) -> Source:
        """Mix sources by weights that sum to 1."""

    @abstractmethod
    def in_order(self, sources: Sequence[Source]) -> Source:
        """Take each source once, one after another."""

    @abstractmethod
    def collate(self, source: Source) -> Collate:
        """What makes batches of a source's rows."""

    @abstractmethod
    def extra_groups(self, num_samples: int | None) -> dict[str, Source]:
        """Validation groups that entries name themselves."""

    @property
    def has_end(self) -> bool:
        """Whether the order of training samples is made for a number of them, and ends there."""
        return False

    def training(self, num_samples: int, sizes: BatchSizes, *, is_endless: bool = False) -> Loader:
        """Batches of the training split of all entries.

        Args:
            num_samples: Samples of the whole run.
            sizes: How batches are cut.
            is_endless: Whether batches go on after `num_samples`: an order that ends there begins
                again.

        Raises:
            ValueError: If an entry has no training data.
        """
        opened = self.open_split("train", num_samples)
        if len(opened) < len(self._datasets):
            have = {entry.data_name for entry, _ in opened}
            missing = [each.data_name for each in self._datasets if each.data_name not in have]
            raise ValueError(
                f"datasets {missing} have no training data: give their `split` a share for "
                "training, or remove them"
            )
        source = self._mixed(opened)
        return Loader(
            source,
            self.collate(source),
            micro_batch_size=sizes.micro_batch_size,
            global_batch_size=sizes.global_batch_size,
            data_rank=sizes.data_rank,
            data_world_size=sizes.data_world_size,
            num_samples=None if is_endless else num_samples,
            period=num_samples if is_endless and self.has_end else None,
            num_workers=sizes.num_workers,
            pin_memory=sizes.pin_memory,
        )

    def evaluation(
        self, split: SplitName, steps: int | None, sizes: BatchSizes, *, is_each_once: bool
    ) -> EvaluationLoader | None:
        """Batches of one split of all entries; `None` if no entry has it.

        Args:
            split: `val` or `test`.
            steps: Global batches; `None` takes the whole split.
            sizes: How batches are cut.
            is_each_once: Every dataset once, in order, whatever the ratios.
        """
        if steps == 0:
            return None
        wanted = None if steps is None else steps * sizes.global_batch_size
        opened = self.open_split(split, wanted)
        if not opened:
            logger.log(
                logging.WARNING if split == "val" else logging.INFO,
                "no data for evaluation: split=%s; it is left out",
                split,
            )
            return None
        sources = [source for _, source in opened]
        if len(sources) > 1 and is_each_once:
            return self._loader(self.in_order(sources), None, sizes)
        return self._loader(self._mixed(opened), wanted, sizes)

    def groups(
        self, split: SplitName, steps: int | None, sizes: BatchSizes
    ) -> dict[str, EvaluationLoader]:
        """Batches of one split by name of the entry, where there are several, or of its groups."""
        if steps == 0:
            return {}
        wanted = None if steps is None else steps * sizes.global_batch_size
        found: dict[str, Source] = {}
        if len(self._datasets) > 1:
            found = {entry.data_name: source for entry, source in self.open_split(split, wanted)}
        if split == "val":
            found.update(self.extra_groups(wanted))
        return {name: self._loader(source, wanted, sizes) for name, source in found.items()}

    def ratios(self, entries: Sequence[DatasetArgs], sizes: Sequence[int]) -> list[float]:
        """Shares of entries, summing to 1: their ratios, or without any their sizes."""
        given = [entry.data_sampling_ratio for entry in entries]
        shares = [share for share in given if share is not None] or [float(size) for size in sizes]
        return [share / sum(shares) for share in shares]

    def _mixed(self, opened: Sequence[tuple[DatasetArgs, Source]]) -> Source:
        if len(opened) == 1:
            return opened[0][1]
        entries, sources = [entry for entry, _ in opened], [source for _, source in opened]
        return self.mix(sources, self.ratios(entries, [source.size for source in sources]))

    def _loader(self, source: Source, wanted: int | None, sizes: BatchSizes) -> EvaluationLoader:
        # More than an epoch would weigh some samples twice.
        most = max(1, source.samples_per_epoch)
        return EvaluationLoader(
            source,
            self.collate(source),
            micro_batch_size=sizes.micro_batch_size,
            global_batch_size=sizes.global_batch_size,
            num_samples=most if wanted is None else min(wanted, most),
            data_rank=sizes.data_rank,
            data_world_size=sizes.data_world_size,
            num_workers=sizes.num_workers,
            pin_memory=sizes.pin_memory,
        )


class TokenOpener(Opener[TokenSource]):
    """Opens entries that hold tokens.

    Args:
        datasets: Entries of the run file.
        context: What the run tells them.
        reset_attention_mask: Keep packed documents apart.
        reset_position_ids: Restart positions at documents.
    """

    def __init__(
        self,
        datasets: Sequence[DatasetArgs],
        context: DataContext,
        *,
        reset_attention_mask: bool,
        reset_position_ids: bool,
    ) -> None:
        super().__init__(datasets, context)
        self._reset_attention_mask = reset_attention_mask
        self._reset_position_ids = reset_position_ids
        self._entries: list[MegatronDatasetArgs | DebugDatasetArgs] = []
        for entry in datasets:
            if not isinstance(entry, MegatronDatasetArgs | DebugDatasetArgs):
                raise ValueError(
                    f"`{entry.data_name}` is a `{entry.class_name}`, which holds prompts and "
                    "answers: pretraining and distillation need a `MegatronDataset`; tokenise text "
                    "with `lme data tokenize`"
                )
            self._entries.append(entry)
        lengths = {entry.data_name: entry.class_args.sequence_length for entry in self._entries}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"`sequence_length` must be the same in all datasets, got {lengths}")
        orders = [_order(entry) for entry in self._entries]
        self._order: Literal["megatron", "stable"] = (
            "megatron" if "megatron" in orders else "stable"
        )

    @property
    def has_end(self) -> bool:
        """Whether the order is Megatron's, which is shuffled for a number of samples."""
        return self._order == "megatron"

    def open_split(
        self, split: SplitName, num_samples: int | None
    ) -> list[tuple[DatasetArgs, TokenSource]]:
        """Open every entry that has the split, for `num_samples` of the mixture."""
        total = 1 if num_samples is None else num_samples
        entries, wanted = self._entries, [total]
        if len(entries) > 1:
            # Shares are of the entries that have the split: the others ask for nothing.
            counts = {entry.data_name: entry.count_tokens(split) for entry in entries}
            entries = [entry for entry in entries if counts[entry.data_name]]
            shares = self.ratios(entries, [counts[entry.data_name] for entry in entries])
            wanted = [each[0] for each in blend_sizes(shares, [total])]
        opened = []
        for entry, samples in zip(entries, wanted, strict=True):
            source = entry.open_tokens(split, samples, self._context)
            if source is not None:
                opened.append((entry, source))
        return opened

    def mix(self, sources: Sequence[TokenSource], weights: Sequence[float]) -> TokenSource:
        """Mix sources by weights that sum to 1."""
        return TokenMixture(sources, weights, order=self._order)

    def in_order(self, sources: Sequence[TokenSource]) -> TokenSource:
        """Take each source once, one after another."""
        sizes = [source.samples_per_epoch for source in sources]
        return TokenMixture(sources, None, order=self._order, sizes=sizes)

    def collate(self, source: TokenSource) -> Collate:
        """What makes batches of a source's rows."""
        return TokenCollator(
            source,
            eos_token_id=self._context.eos_token_id,
            reset_attention_mask=self._reset_attention_mask,
            reset_position_ids=self._reset_position_ids,
        )

    def extra_groups(self, num_samples: int | None) -> dict[str, TokenSource]:
        """Validation groups that entries name themselves."""
        found: dict[str, TokenSource] = {}
        for entry in self._entries:
            if isinstance(entry, MegatronDatasetArgs):
                found.update(entry.open_groups(num_samples or 1, self._context))
        return found


class ExampleOpener(Opener[ExampleSource]):
    """Opens entries that hold prompts and answers.

    Args:
        datasets: Entries of the run file.
        context: What the run tells them.
        loss_mask: Train the answers only, or the prompts too.
        pad_to_multiple_of: Rows are padded to a multiple of this.
    """

    def __init__(
        self,
        datasets: Sequence[DatasetArgs],
        context: DataContext,
        *,
        loss_mask: Literal["output_only", "no_mask"],
        pad_to_multiple_of: int,
    ) -> None:
        super().__init__(datasets, context)
        self._loss_mask: Literal["output_only", "no_mask"] = loss_mask
        self._multiple_of = pad_to_multiple_of
        self._entries: list[HuggingFaceDatasetArgs | PresetDatasetArgs | DebugDatasetArgs] = []
        for entry in datasets:
            if isinstance(entry, MegatronDatasetArgs):
                raise ValueError(
                    f"`{entry.data_name}` is a `MegatronDataset`, which holds tokens without "
                    "prompts: full_finetuning needs a `HuggingFaceDataset`"
                )
            self._entries.append(entry)

    def open_split(
        self, split: SplitName, num_samples: int | None
    ) -> list[tuple[DatasetArgs, ExampleSource]]:
        """Open every entry that has the split; how many samples are wanted changes nothing."""
        opened = []
        for entry in self._entries:
            source = entry.open_examples(split, self._context)
            if source is not None and source.size:
                opened.append((entry, source))
        return opened

    def mix(self, sources: Sequence[ExampleSource], weights: Sequence[float]) -> ExampleSource:
        """Mix sources by weights that sum to 1."""
        return ExampleMixture(sources, weights, order="stable")

    def in_order(self, sources: Sequence[ExampleSource]) -> ExampleSource:
        """Take each source once, one after another."""
        sizes = [source.size for source in sources]
        return ExampleMixture(sources, None, order="stable", sizes=sizes)

    def collate(self, source: ExampleSource) -> Collate:
        """What makes batches of a source's rows."""
        tokenizer, end = self._context.tokenizer, self._context.eos_token_id
        pad = None if tokenizer is None else tokenizer.pad_token_id
        return ExampleCollator(
            source,
            pad_token_id=next((each for each in (pad, end) if each is not None), 0),
            loss_mask=self._loss_mask,
            multiple_of=self._multiple_of,
        )

    def extra_groups(self, num_samples: int | None) -> dict[str, ExampleSource]:
        """None: prompts and answers have no further groups."""
        return {}


def _order(entry: MegatronDatasetArgs | DebugDatasetArgs) -> Literal["megatron", "stable"]:
    return entry.class_args.order if isinstance(entry, MegatronDatasetArgs) else "stable"

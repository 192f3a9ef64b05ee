"""Tokenised text on disk as samples of one length: `.bin/.idx` files, blended and shuffled."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lme_data.context import DataContext, SplitName
from lme_data.corpus import CorpusSource
from lme_data.dataset.base import check_entry, check_no_text_settings
from lme_data.fim import FillInTheMiddle
from lme_data.indexed import IndexedTokens
from lme_data.manifest import read_manifest
from lme_data.mixture import TokenMixture
from lme_data.paths import Blend, parse_blend
from lme_data.rows import TokenSource
from lme_data.splits import SPLITS, blend_sizes, parse_split, split_bounds

logger = logging.getLogger(__name__)


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
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` must be 0 to 2**32 - 1, got {self.seed}")
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

    def open_tokens(
        self, split: SplitName, num_samples: int, context: DataContext
    ) -> TokenSource | None:
        """Open one split.

        Args:
            split: Which.
            num_samples: Samples wanted of it; in Megatron's order the order depends on it.
            context: Seed, vocabulary and tokenizer.

        Returns:
            `None` if the run file gives the split nothing.

        Raises:
            FileNotFoundError: If a corpus is missing.
            CorruptDataError: If a corpus contradicts itself.
            ValueError: If the split is empty although it was given a share, or its ids do not fit
                the vocabulary.
        """
        if split == "train":
            self._warn_of_settings_without_effect()
        path, split_text = self._split_path(split)
        if path is None or parse_split(split_text)[SPLITS.index(split)] == 0:
            return None
        return self._open_blend(parse_blend(path), self.data_name, split, num_samples, context)

    def open_groups(self, num_samples: int, context: DataContext) -> dict[str, TokenSource]:
        """Open the validation groups of `val_weighted_split_paths`, by name."""
        groups = {}
        for entry in self.class_args.val_weighted_split_paths or []:
            for name, path in entry.items():
                blend = parse_blend(path, "val_weighted_split_paths")
                groups[name] = self._open_blend(
                    blend, name, "val", num_samples, context, whole=True
                )
        return groups

    def count_tokens(self, split: SplitName) -> int:
        """Tokens of a split; 0 if the run file gives it nothing."""
        path, split_text = self._split_path(split)
        if path is None or parse_split(split_text)[SPLITS.index(split)] == 0:
            return 0
        total = 0
        for prefix in parse_blend(path).prefixes:
            corpus = IndexedTokens(prefix)
            first, last = _split_range(corpus, split, split_text)
            total += int(corpus.lengths[first:last].sum(dtype=np.int64))
        return total

    def prefixes(self) -> list[str]:
        """Prefixes of all corpora, for their manifests."""
        args = self.class_args
        paths = (args.data_path, args.train_data_path, args.val_data_path, args.test_data_path)
        return [prefix for path in paths if path for prefix in parse_blend(path).prefixes]

    def _warn_of_settings_without_effect(self) -> None:
        args = self.class_args
        if args.split is not None and args.data_path is None:
            logger.warning("`split` has no effect beside `train_data_path` and its like")
        if args.node_uses_local_storage:
            logger.warning(
                "`node_uses_local_storage` has no effect: every process builds the index it lacks"
            )

    def _split_path(self, split: SplitName) -> tuple[str | list[str | float] | None, str]:
        args = self.class_args
        if args.data_path is not None:
            return args.data_path, str(args.split)
        per_split = {
            "train": args.train_data_path,
            "val": args.val_data_path,
            "test": args.test_data_path,
        }
        # The whole corpus, at this split's place.
        whole = ",".join("1" if name == split else "0" for name in SPLITS)
        return per_split[split], whole

    def _open_blend(
        self,
        blend: Blend,
        name: str,
        split: SplitName,
        num_samples: int,
        context: DataContext,
        *,
        whole: bool = False,
    ) -> TokenSource:
        split_text = self._split_path(split)[1] if not whole else "0,1,0"
        corpora = [IndexedTokens(prefix) for prefix in blend.prefixes]
        ranges = [_split_range(corpus, split, split_text) for corpus in corpora]
        if len(corpora) == 1:
            return self._open_corpus(
                corpora[0], name, split, split_text, ranges[0], num_samples, context
            )
        weights = blend.weights
        if weights is None:
            sequences = [corpus.num_sequences for corpus in corpora]
            weights = tuple(count / sum(sequences) for count in sequences)
        wanted = [sizes[0] for sizes in blend_sizes(weights, [num_samples])]
        sources = [
            self._open_corpus(corpus, label, split, split_text, bounds, samples, context)
            for corpus, label, bounds, samples in zip(
                corpora, _labels(name, blend.prefixes), ranges, wanted, strict=True
            )
        ]
        order = self.class_args.order
        if blend.weights is None and order == "megatron":
            return TokenMixture(sources, None, order=order, sizes=wanted)
        return TokenMixture(sources, weights, order=order)

    def _open_corpus(
        self,
        corpus: IndexedTokens,
        name: str,
        split: SplitName,
        split_text: str,
        bounds: tuple[int, int],
        num_samples: int,
        context: DataContext,
    ) -> CorpusSource:
        args = self.class_args
        manifest = read_manifest(corpus.prefix)
        largest = None if manifest is None else manifest.largest_id
        if context.vocab_size is not None and largest is not None and largest >= context.vocab_size:
            raise ValueError(
                f"{corpus.prefix} holds token ids up to {largest}, `vocab_size` is "
                f"{context.vocab_size}: the corpus was made with another tokenizer, or `vocab_size` "
                "is too small"
            )
        seed = context.seed if args.seed is None else args.seed
        return CorpusSource(
            corpus,
            name=name,
            first_sequence=bounds[0],
            last_sequence=bounds[1],
            sequence_length=args.sequence_length,
            seed=seed,
            order=args.order,
            num_samples=num_samples,
            vocab_size=context.vocab_size,
            split_name=split,
            split=split_text,
            cache_path=args.data_cache_path,
            transform=self._transform(seed, context),
        )

    def _transform(
        self, seed: int, context: DataContext
    ) -> Callable[[np.ndarray, int], np.ndarray] | None:
        if self.class_args.fim_rate == 0:
            return None
        if context.tokenizer is None:
            raise ValueError("`fim_rate` needs a tokenizer: give `tokenizer_args.tokenizer_name`")
        needed = context.tokenizer.vocab_size
        if context.vocab_size is not None and needed > context.vocab_size:
            raise ValueError(
                f"`fim_rate` encodes text anew: `vocab_size` {context.vocab_size} must hold the "
                f"tokenizer's {needed} ids"
            )
        return FillInTheMiddle(
            context.tokenizer,
            rate=self.class_args.fim_rate,
            spm_rate=self.class_args.fim_spm_rate,
            seed=seed,
        )


def _split_range(corpus: IndexedTokens, split: SplitName, split_text: str) -> tuple[int, int]:
    number = SPLITS.index(split)
    bounds = split_bounds(parse_split(split_text), corpus.num_sequences)
    first, last = bounds[number], bounds[number + 1]
    if first >= last:
        raise ValueError(
            f"`split` {split_text} leaves `{split}` no document: {corpus.prefix} has "
            f"{corpus.num_sequences}; give it a larger share, more documents, or the share 0"
        )
    return first, last


def _labels(name: str, prefixes: tuple[str, ...]) -> list[str]:
    """Names of the corpora of a blend, told apart by their files, else by their number."""
    files = [Path(prefix).name for prefix in prefixes]
    if len(set(files)) == len(files):
        return [f"{name}/{file}" for file in files]
    return [f"{name}/{number}-{file}" for number, file in enumerate(files)]

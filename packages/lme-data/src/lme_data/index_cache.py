"""Sample indices kept on disk: named by what they depend on, written whole or not at all."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from lme_data.atomic import write_atomically
from lme_data.sampling import SampleIndex, count_epochs, count_samples

logger = logging.getLogger(__name__)

_PARTS = ("document_index", "sample_index", "shuffle_index")


def describe_index(
    *,
    path_prefix: str,
    num_samples: int,
    index_split: str,
    split: str,
    random_seed: int,
    sequence_length: int,
) -> str:
    """Text that names an index; its MD5 is part of the file names, as in the field's caches.

    Args:
        path_prefix: Prefix of the pair.
        num_samples: Samples wanted.
        index_split: `train`, `valid` or `test`.
        split: Shares as given.
        random_seed: Seed of the order.
        sequence_length: Tokens of a sample.
    """
    return json.dumps(
        {
            "class": "GPTDataset",
            "path_prefix": path_prefix,
            "num_samples": num_samples,
            "index_split": index_split,
            "name": None,
            "split": split,
            "random_seed": random_seed,
            "sequence_length": sequence_length,
        },
        indent=4,
    )


def cached_index(
    folder: str | Path | None,
    description: str,
    build: Callable[[], SampleIndex],
    *,
    tokens_per_epoch: int,
    sequences_per_epoch: int,
) -> SampleIndex:
    """Load an index from a folder, or build it and put it there.

    A cached index whose sizes do not fit the corpus as it is now is built again, so a corpus that
    was rewritten under its old name is not read with an old index.

    Args:
        folder: Where indices are kept; `None` builds in memory.
        description: From `describe_index`.
        build: Builds it.
        tokens_per_epoch: Tokens of the split.
        sequences_per_epoch: Sequences of the split.
    """
    if folder is None:
        return build()
    # A name, not a safeguard.
    key = hashlib.md5(description.encode(), usedforsecurity=False).hexdigest()
    paths = {part: Path(folder) / f"{key}-GPTDataset-{part}.npy" for part in _PARTS}
    wanted: Mapping[str, object] = json.loads(description)
    cached = _load(paths)
    if cached is not None and _fits(cached, wanted, tokens_per_epoch, sequences_per_epoch):
        return cached
    index = build()
    for part, path in paths.items():
        array = getattr(index, part)
        write_atomically(path, lambda file, array=array: np.save(file, array, allow_pickle=False))
    write_atomically(
        Path(folder) / f"{key}-GPTDataset-description.txt",
        lambda file: file.write(description.encode()),
    )
    logger.info("sample index cached: folder=%s key=%s samples=%d", folder, key, index.num_samples)
    return _load(paths) or index


def _load(paths: Mapping[str, Path]) -> SampleIndex | None:
    arrays = []
    for path in paths.values():
        if not path.exists():
            return None
        try:
            loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            logger.warning("sample index was unreadable and is rebuilt: %s (%s)", path, error)
            return None
        arrays.append(np.asarray(loaded))
    return SampleIndex(*arrays)


def _fits(index: SampleIndex, wanted: Mapping[str, object], tokens: int, sequences: int) -> bool:
    length, samples = int(str(wanted["sequence_length"])), int(str(wanted["num_samples"]))
    epochs = count_epochs(tokens, length, samples)
    total = count_samples(tokens, epochs, length)
    return (
        index.document_index.shape == (epochs * sequences,)
        and index.sample_index.shape == (total + 1, 2)
        and index.shuffle_index.shape == (total,)
    )

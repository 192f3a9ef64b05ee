"""Loaders: an endless order of samples cut into micro batches, with one integer as its position."""

import collections
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from lme_data.collate import Batch, Collate
from lme_data.rows import RowSource

STATE_VERSION = 1
"""Version of `Loader.state_dict`."""

# Batches each worker may have ready.
_AHEAD = 2


class Loader:
    """Micro batches of one data-parallel rank, in an order that no setting of speed changes.

    Training samples are numbered by their place in `source`. Step n takes places `n * G` to
    `(n + 1) * G`, G the global batch; within it, micro batch m of rank r takes rows
    `(m * W + r) * micro` and on, W the number of ranks. The position is the number of samples all
    ranks have been given together.

    Args:
        source: The order of samples.
        collate: Makes batches of rows.
        micro_batch_size: Rows of a batch.
        global_batch_size: Rows of a step over all ranks; a multiple of `micro * W`.
        data_rank: This rank among those that read different data.
        data_world_size: Number of those, W.
        num_samples: Where to stop; `None` goes on for ever.
        period: After so many samples the order begins again; `None`: it does not.
        num_workers: Threads that prepare batches ahead; 0 prepares them when asked.
        pin_memory: Page-locked tensors, for copies to a GPU.

    Raises:
        ValueError: If the sizes do not divide.
    """

    def __init__(
        self,
        source: RowSource,
        collate: Collate,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_rank: int = 0,
        data_world_size: int = 1,
        num_samples: int | None = None,
        period: int | None = None,
        num_workers: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self._slicing = Slicing(micro_batch_size, global_batch_size, data_rank, data_world_size)
        self._source = source
        self._collate = collate
        self._num_samples = num_samples
        self._period = period
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._position = 0
        # First place of a global batch; another batch size on resume begins a new count here.
        self._origin = 0
        self._ahead = Ahead(self._make, num_workers)

    @property
    def source_names(self) -> tuple[str, ...]:
        """Name of each number in a batch's `source`."""
        return self._source.names

    @property
    def position(self) -> int:
        """Samples given out so far, over all ranks."""
        return self._position

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._is_past_end(self._position):
            raise StopIteration
        batch = self._ahead.take(self._position, self._slicing.round_size, self._is_past_end)
        self._position += self._slicing.round_size
        return batch

    def state_dict(self) -> dict[str, object]:
        """Position and, per corpus, cursor, as JSON; the same on every rank."""
        place = self._place(self._position)
        return {
            "format_version": STATE_VERSION,
            "position": self._position,
            "cursors": self._source.cursors(place),
            "source": self._source.state(place),
            "inputs": self._source.describe(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go to a saved position; nothing before it is read.

        Args:
            state: From `state_dict`, of a run with any number of ranks and workers.

        Raises:
            ValueError: If the order of this loader is not the one the state was saved in.
        """
        if state.get("format_version") != STATE_VERSION:
            raise ValueError(
                f"the loader's state has version {state.get('format_version')}, this lme-data "
                f"reads {STATE_VERSION}: use the lme-data that saved it"
            )
        _refuse_other_order(state.get("inputs"), self._source.describe())
        position, source_state = state.get("position"), state.get("source")
        if not isinstance(position, int) or not isinstance(source_state, Mapping):
            raise ValueError("the loader's state has no position: it is not a loader's state")
        self._ahead.clear()
        self._source.restore(source_state, self._place(position))
        self._position = self._origin = position

    def skip_to(self, position: int) -> None:
        """Go to a position without a saved state; nothing before it is read.

        Args:
            position: Samples given out before, over all ranks.
        """
        self._ahead.clear()
        self._position = self._origin = position

    def close(self) -> None:
        """Stop preparing batches."""
        self._ahead.close()

    def _is_past_end(self, position: int) -> bool:
        end = self._num_samples
        return end is not None and position + self._slicing.round_size > end

    def _place(self, position: int) -> int:
        """Place in the source; the end is told from the start until something lies behind it."""
        is_first_pass = self._period is None or position <= self._period
        return position if is_first_pass else position % (self._period or 1)

    def _make(self, position: int) -> Batch:
        places, rows = self._slicing.rows(position - self._origin)
        places += self._origin
        if self._period is not None:
            places %= self._period
        batch = self._collate(places, rows, np.ones(len(rows), bool))
        return _pinned(batch) if self._pin_memory else batch


class EvaluationLoader:
    """The same batches each time it is iterated: the first samples of an order.

    Ranks share them as in training. Rows past the end are there to keep shapes equal and have no
    labels, so any number of ranks evaluates the same tokens.

    Args:
        source: The order of samples.
        collate: Makes batches of rows.
        micro_batch_size: Rows of a batch.
        global_batch_size: Rows of a global batch; a multiple of `micro * W`.
        num_samples: How many samples are evaluated.
        data_rank: This rank among those that read different data.
        data_world_size: Number of those, W.
        num_workers: Threads that prepare batches ahead.
        pin_memory: Page-locked tensors, for copies to a GPU.
    """

    def __init__(
        self,
        source: RowSource,
        collate: Collate,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        num_samples: int,
        data_rank: int = 0,
        data_world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self._slicing = Slicing(micro_batch_size, global_batch_size, data_rank, data_world_size)
        self._source = source
        self._collate = collate
        self.num_samples = num_samples
        """Samples that one iteration evaluates, over all ranks."""
        self._num_workers = num_workers
        self._pin_memory = pin_memory

    @property
    def source_names(self) -> tuple[str, ...]:
        """Name of each number in a batch's `source`."""
        return self._source.names

    def __len__(self) -> int:
        return -(-self.num_samples // self._slicing.round_size)

    def __iter__(self) -> Iterator[Batch]:
        ahead = Ahead(self._make, self._num_workers)
        try:
            for number in range(len(self)):
                position = number * self._slicing.round_size
                yield ahead.take(position, self._slicing.round_size, self._is_past_end)
        finally:
            ahead.close()

    def _is_past_end(self, position: int) -> bool:
        return position >= self.num_samples

    def _make(self, position: int) -> Batch:
        places, rows = self._slicing.rows(position)
        counted = places[rows] < self.num_samples
        batch = self._collate(np.minimum(places, self.num_samples - 1), rows, counted)
        return _pinned(batch) if self._pin_memory else batch


class Slicing:
    """Which rows of which global batch a rank takes at a position.

    Args:
        micro_batch_size: Rows of a batch of one rank.
        global_batch_size: Rows of a step over all ranks.
        data_rank: This rank.
        data_world_size: Number of ranks.

    Raises:
        ValueError: If the sizes do not divide.
    """

    def __init__(
        self, micro_batch_size: int, global_batch_size: int, data_rank: int, data_world_size: int
    ) -> None:
        if micro_batch_size < 1 or not 0 <= data_rank < data_world_size:
            raise ValueError(
                f"`micro_batch_size` {micro_batch_size} must be at least 1 and data rank "
                f"{data_rank} below the number of ranks {data_world_size}"
            )
        self.round_size = micro_batch_size * data_world_size
        """Rows that all ranks take together at once."""
        if global_batch_size < 1 or global_batch_size % self.round_size:
            raise ValueError(
                f"`global_batch_size` {global_batch_size} must be a multiple of "
                f"`micro_batch_size` {micro_batch_size} times {data_world_size} data-parallel ranks"
            )
        self._micro = micro_batch_size
        self._global = global_batch_size
        self._rank = data_rank

    def rows(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Places of the global batch at a position, and this rank's rows of it; int64 both."""
        start = position - position % self._global
        first = position - start + self._rank * self._micro
        return (
            np.arange(start, start + self._global, dtype=np.int64),
            np.arange(first, first + self._micro, dtype=np.int64),
        )


class Ahead:
    """Calls a function for coming positions on threads, and gives the results in order.

    Args:
        make: From position to result; its errors surface when that position is taken.
        num_workers: Threads; 0 calls when asked.
    """

    def __init__(self, make: Callable[[int], Batch], num_workers: int) -> None:
        self._make = make
        self._num_workers = num_workers
        self._pool: ThreadPoolExecutor | None = None
        self._pending: collections.deque[tuple[int, Future[Batch]]] = collections.deque()

    def take(self, position: int, step: int, is_past_end: Callable[[int], bool]) -> Batch:
        """Result for a position, while those after it are prepared.

        Args:
            position: Which; normally `step` after the one before.
            step: Distance of positions.
            is_past_end: Whether there is nothing at a position.
        """
        if self._num_workers == 0:
            return self._make(position)
        if self._pending and self._pending[0][0] != position:
            self.clear()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="lme-data")
        coming = self._pending[-1][0] + step if self._pending else position
        while len(self._pending) < self._num_workers * _AHEAD and not is_past_end(coming):
            self._pending.append((coming, self._pool.submit(self._make, coming)))
            coming += step
        return self._pending.popleft()[1].result()

    def clear(self) -> None:
        """Forget what was prepared."""
        for _, future in self._pending:
            future.cancel()
        for _, future in self._pending:
            if not future.cancelled():
                future.exception()
        self._pending.clear()

    def close(self) -> None:
        """Stop the threads."""
        self.clear()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _pinned(batch: Batch) -> Batch:
    return {name: tensor.pin_memory() for name, tensor in batch.items()}


def _refuse_other_order(saved: object, current: dict[str, object]) -> None:
    differences = sorted(_differences(saved, current, ""))
    if differences:
        raise ValueError(
            "the data order of this run is not the saved one:\n  "
            + "\n  ".join(differences)
            + "\ngo on with the saved settings, or train with `class_args.order: stable`, in which "
            "steps, batch sizes and weights may change"
        )


def _differences(saved: object, current: object, path: str) -> list[str]:
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        result = []
        # In the stable order sources may come and go; those of both runs must be the same.
        shared = (
            set(saved) & set(current) if path.endswith("sources") else set(saved) | set(current)
        )
        for key in shared:
            result += _differences(saved.get(key), current.get(key), f"{path}.{key}".lstrip("."))
        return result
    return [] if saved == current else [f"`{path}`: saved {saved}, now {current}"]

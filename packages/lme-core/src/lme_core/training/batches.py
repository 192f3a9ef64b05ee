"""Batches on their way from a loader to the device: one step ahead, restartable, countable."""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]


class Loader(Protocol):
    """Gives micro batches and knows where it stands."""

    def __next__(self) -> Batch:
        """Return the next micro batch, on the host; StopIteration at the end."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position, fit for JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position."""
        ...


@dataclass(frozen=True, slots=True)
class StepBatches:
    """What one optimizer step trains on."""

    micro_batches: list[Batch]
    """On the device."""
    tokens: int
    """Tokens in them over all replicas, padding left out."""
    wait_seconds: float
    """How long the loop waited for them."""


@dataclass(frozen=True, slots=True)
class _Fetched:
    micro_batches: list[Batch]
    tokens: int
    position: dict[str, Any]


class BatchStream:
    """Groups micro batches into steps and fetches the next step's while this one runs.

    A thread reads the loader and starts the copy to the device. The position it reports is that
    of the steps handed out: a step that was fetched ahead and never used is not counted.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        gradient_accumulation_steps: int,
        device: torch.device | str,
        num_replicas: int = 1,
    ) -> None:
        """Wrap a loader.

        Args:
            loader: Of this replica's micro batches; nobody else may advance it from now on.
            gradient_accumulation_steps: Micro batches per step.
            device: Where they go.
            num_replicas: Data-parallel replicas, each with as many tokens.
        """
        self._loader = loader
        self._accumulation = gradient_accumulation_steps
        self._device = torch.device(device)
        self._num_replicas = num_replicas
        self._position = loader.state_dict()
        self._executor: ThreadPoolExecutor | None = None
        self._pending: Future[_Fetched | None] | None = None

    def __next__(self) -> StepBatches:
        """Return the next step's batches; StopIteration where the loader ends."""
        started = time.perf_counter()
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "lme-batches")
        pending = self._pending or self._executor.submit(self._fetch)
        self._pending = None
        fetched = pending.result()
        if fetched is None:
            raise StopIteration
        self._pending = self._executor.submit(self._fetch)
        self._position = fetched.position
        return StepBatches(fetched.micro_batches, fetched.tokens, time.perf_counter() - started)

    def __iter__(self) -> "BatchStream":
        """Return the stream itself."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's position after the steps handed out."""
        return self._position

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; what was fetched ahead is dropped."""
        self.close()
        self._loader.load_state_dict(state)
        self._position = self._loader.state_dict()

    def close(self) -> None:
        """End the thread and put the loader back to the reported position."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None
        if self._pending is not None:
            self._pending = None
            self._loader.load_state_dict(self._position)

    def _fetch(self) -> _Fetched | None:
        micro_batches: list[Batch] = []
        tokens = 0
        for _ in range(self._accumulation):
            try:
                batch = next(self._loader)
            except StopIteration:
                return None
            tokens += count_tokens(batch)
            micro_batches.append(to_device(batch, self._device))
        return _Fetched(micro_batches, tokens * self._num_replicas, self._loader.state_dict())


class FixedBatches:
    """The same batches every time they are gone through: what evaluation needs."""

    def __init__(self, loader: Loader, num_batches: int) -> None:
        """Take the loader's present position as the start.

        Args:
            loader: Nobody else may advance it.
            num_batches: Micro batches an evaluation takes; fewer if the loader ends before.
        """
        self._loader = loader
        self._num_batches = num_batches
        self._start = loader.state_dict()

    def __iter__(self) -> Iterator[Batch]:
        """Go back to the start and yield the batches."""
        self._loader.load_state_dict(self._start)
        for _ in range(self._num_batches):
            try:
                yield next(self._loader)
            except StopIteration:
                return


def count_tokens(batch: Batch) -> int:
    """Count the tokens of a batch on the host, padding left out.

    Args:
        batch: With `input_ids` (B, S), and `valid` (B, S) where some are padding.

    Returns:
        Their number.
    """
    if "valid" in batch:
        return int(batch["valid"].sum())
    return batch["input_ids"].numel()


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Start the copy of a batch to a device, without waiting for it.

    Args:
        batch: On the host.
        device: Where to.

    Returns:
        The batch there.
    """
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    # Only from pinned memory does the copy run beside the host.
    return {
        name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()
    }

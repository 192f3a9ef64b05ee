"""Seconds of a call on a device: medians with a cold cache, by events or in a CUDA graph."""

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch

# Larger than the cache of any GPU: what a call reads comes from memory.
FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one call."""

    median: float
    low: float
    """A fifth of the calls took less."""
    high: float
    """A fifth took more."""
    repeats: int


class OutOfTimeError(Exception):
    """A measurement took longer than it may."""


@contextmanager
def limit(seconds: float | None) -> Iterator[None]:
    """Stop what takes longer, at the next Python instruction: a tuner of another library may.

    Args:
        seconds: The most it may take; `None` for any.

    Yields:
        Nothing.
    """
    if seconds is None:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise OutOfTimeError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


class Stopwatch:
    """Times calls on one device."""

    def __init__(self, device: torch.device, seconds: float, most: int = 200) -> None:
        """Allocate what flushes the cache.

        Args:
            device: Where calls run.
            seconds: About how long to repeat a call.
            most: The most repeats.
        """
        self.device = device
        self._seconds = seconds
        self._most = most
        self._broken: str | None = None
        self._flush = None
        if device.type == "cuda":
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def times(self, run: Callable[[], object]) -> Times:
        """Measure a call after it was warmed up.

        On a GPU calls are enqueued one after the other, as `triton.testing.do_bench` does: what
        Python takes is part of the time only as far as the device waits for it.

        Args:
            run: The call.

        Returns:
            Its times.
        """
        run()
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        once = max(time.perf_counter() - start, 1e-6)
        # A loop over tokens in plain torch takes a second.
        least = 5 if once < 0.2 else 1
        repeats = max(least, min(self._most, int(self._seconds / once)))
        if self._flush is None:
            seconds = [self._on_cpu(run) for _ in range(repeats)]
        else:
            seconds = self._on_gpu(run, repeats, self._flush)
        ordered = sorted(seconds)
        fifth = repeats // 5
        return Times(statistics.median(ordered), ordered[fifth], ordered[-1 - fifth], repeats)

    def wait(self) -> None:
        """Wait for the device."""
        if self._flush is not None:
            torch.cuda.synchronize(self.device)

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """Most memory that a call has beyond what there was before it; `None` on a CPU."""
        if self._flush is None:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def why_not_graph(self, run: Callable[[], object]) -> str | None:
        """Say why a call is not captured: a capture that fails disturbs all later ones.

        Args:
            run: The call; it runs once.

        Returns:
            The reason in words, or `None`.
        """
        if self._broken is not None:
            return f"not captured: in this process a capture failed before ({self._broken})"
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return "not captured: it waits for the device"
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        return None

    def graph(self, run: Callable[[], object]) -> Callable[[], None]:
        """Capture a call, which has run before.

        Args:
            run: The call; what it returns is kept as long as the graph.

        Returns:
            What replays it.
        """
        try:
            return self._captured(run)
        except Exception as error:
            self._broken = type(error).__name__
            raise

    def _captured(self, run: Callable[[], object]) -> Callable[[], None]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()

        def replay(kept: object = kept) -> None:
            graph.replay()

        return replay

    def _on_cpu(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def _on_gpu(self, run: Callable[[], object], repeats: int, flush: torch.Tensor) -> list[float]:
        pairs = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        self.wait()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

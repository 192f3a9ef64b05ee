"""How fast a run is: tokens per second, FLOPs, waiting and memory."""

import resource
import sys
import time
from typing import Any

import torch

from lme_core.training.trainer import StepReport


class Throughput:
    """Adds up the time of training steps between two readings, evaluation and saving left out."""

    def __init__(
        self,
        *,
        num_devices: int = 1,
        flops_per_token: float | None = None,
        device_peak_flops: float | None = None,
        cost_per_accelerator_per_hour: float | None = None,
    ) -> None:
        """Say what the machine is.

        Args:
            num_devices: Devices that share the work.
            flops_per_token: Model FLOPs of forward and backward per token; none if unknown.
            device_peak_flops: Dense peak of one device in the run's dtype, FLOP/s; none if unknown.
            cost_per_accelerator_per_hour: US dollars; none to leave the cost out.
        """
        self._num_devices = num_devices
        self._flops_per_token = flops_per_token
        self._peak = device_peak_flops
        self._price = cost_per_accelerator_per_hour
        self._cost = 0.0
        self._cost_counted_at = time.perf_counter()
        self._reset()

    def add(self, report: StepReport) -> None:
        """Count a step as ending now. Call it first after the step, and after any waiting for it.

        Args:
            report: Of that step.
        """
        self._seconds += time.perf_counter() - report.started
        self._wait += report.data_wait_seconds
        self._tokens += report.tokens
        self._steps += 1

    def read(self) -> dict[str, Any]:
        """Return the means since the last reading and start anew.

        Returns:
            `tokens_per_second` over all devices, `tflops_per_device` and `mfu` (null if unknown),
            `step_seconds` and `data_wait_seconds` per step, and `cost_usd` of the whole run
            (evaluation and saving included) where a price is known.
        """
        seconds = max(self._seconds, 1e-9)
        steps = max(self._steps, 1)
        rate = self._tokens / seconds
        flops = None
        if self._flops_per_token is not None:
            flops = rate * self._flops_per_token / self._num_devices
        reading: dict[str, Any] = {
            "tokens_per_second": rate,
            "tflops_per_device": None if flops is None else flops / 1e12,
            "mfu": None if flops is None or self._peak is None else flops / self._peak,
            "step_seconds": self._seconds / steps,
            "data_wait_seconds": self._wait / steps,
        }
        if self._price is not None:
            reading["cost_usd"] = self._spend()
        self._reset()
        return reading

    def state_dict(self) -> dict[str, Any]:
        """Return the money spent, fit for JSON."""
        return {} if self._price is None else {"cost_usd": self._spend()}

    def load_state_dict(self, state: Any) -> None:
        """Go on from the money spent by the run so far."""
        self._cost = float(state.get("cost_usd", 0.0))

    def _spend(self) -> float:
        now = time.perf_counter()
        hours = (now - self._cost_counted_at) / 3600
        self._cost += hours * self._num_devices * (self._price or 0.0)
        self._cost_counted_at = now
        return self._cost

    def _reset(self) -> None:
        self._seconds = 0.0
        self._wait = 0.0
        self._tokens = 0
        self._steps = 0


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory in use so far.

    Args:
        device: Where the run is.

    Returns:
        Bytes that tensors took at once on a GPU; bytes resident of the process elsewhere.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, KiB elsewhere.
    return peak if sys.platform == "darwin" else peak * 1024

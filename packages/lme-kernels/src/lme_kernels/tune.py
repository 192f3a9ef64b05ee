"""Measure launch settings of the kernels over rows on this GPU: `python -m lme_kernels.tune`."""

import argparse
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from triton.errors import TritonError

from lme_kernels import functional
from lme_kernels.tuning import RowSettings, bucket, cache_path, row_candidates, search, using

logger = logging.getLogger(__name__)

# Arguments of each op for rows `x` and a weight.
CALLS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor | None, ...]]] = {
    "rmsnorm": lambda x, weight: (x, weight),
    "fused_residual_add_rmsnorm": lambda x, weight: (x, torch.randn_like(x), weight),
    "layernorm": lambda x, weight: (x, weight, torch.randn_like(weight)),
    "gated_rmsnorm": lambda x, weight: (x, torch.randn_like(x), weight),
    "p_norm": lambda x, weight: (x, weight),
    "softmax": lambda x, weight: (x,),
}


def tune(name: str, rows: int, columns: int, dtype: torch.dtype) -> dict[str, RowSettings]:
    """Measure every candidate of an op's forward and backward and store the fastest.

    Args:
        name: Name of the op, one of `CALLS`.
        rows: Number of rows.
        columns: Number of columns.
        dtype: Dtype of the rows and of the weight.

    Returns:
        The fastest settings by the name of the kernel.
    """
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    x = torch.randn(rows, columns, device="cuda", dtype=dtype)
    weight = torch.randn(columns, device="cuda", dtype=dtype)
    arguments = CALLS[name](x, weight)
    leaves = [each.requires_grad_() for each in arguments if each is not None]
    function = vars(functional)[name]

    def forward() -> tuple[Tensor, ...]:
        result = function(*arguments, backend="triton")
        return result if isinstance(result, tuple) else (result,)

    outputs = forward()
    grads = [torch.randn_like(each) for each in outputs]

    def backward() -> object:
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    best = {}
    # The softmax has no gradient of a weight: its backward is launched like its forward.
    runs = {"forward": forward} if name == "softmax" else {"forward": forward, "backward": backward}
    for direction, run in runs.items():
        op = f"{name}.{direction}"

        def measure(settings: RowSettings, op: str = op, run: Callable[[], object] = run) -> float:
            try:
                with using(op, settings):
                    return seconds_of(run)
            except TritonError as error:
                raise RuntimeError(f"cannot be launched: {error}") from error

        key = bucket(rows, columns, x.element_size())
        candidates = row_candidates(op, rows, columns, processors)
        best[op] = search(op, key, candidates, measure)
    return best


def seconds_of(run: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call on the device, with a cold cache.

    Args:
        run: What to call.
        repeats: How often.

    Returns:
        Seconds, without the time that Python takes to launch.
    """
    run()
    # Larger than the cache of any GPU: what a call reads comes from memory.
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Keeps the device busy until both are enqueued, so that launches are not part of the time.
        torch.cuda._sleep(400_000)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and tune.

    Args:
        arguments: What to read; `None` for the process's own.
    """
    parser = argparse.ArgumentParser(prog="python -m lme_kernels.tune", description=__doc__)
    parser.add_argument("--op", action="append", choices=list(CALLS), help="default: all")
    parser.add_argument("--shape", action="append", required=True, help="ROWSxCOLUMNS")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    for shape in given.shape:
        rows, columns = (int(each) for each in shape.split("x"))
        for name in given.op or CALLS:
            tune(name, rows, columns, dtype[given.dtype])
    logger.info("settings written: path=%s", cache_path())


if __name__ == "__main__":
    main()

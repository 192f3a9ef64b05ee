"""Chunked recurrences on one GPU: lme-kernels beside flash-linear-attention and mamba_ssm, bf16.

    python benchmarks/linear_attention.py [--quick] [--only NAME ...] [--repeats 20]
    python benchmarks/linear_attention.py --tune walk gradients [--width 128]

Times are medians of calls with a cold cache, forward and forward with backward, after each side has
warmed up, compiled and tuned itself. GB/s count what must be read and written once: inputs and
outputs, and in the backward inputs, the gradient of the outputs, and gradients of the inputs. A peer
that is not installed, or fails, leaves its cell empty; a row of ours that fails prints the error.

`--tune` measures the settings of our kernels at one shape and prints the fastest.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lme_kernels.functional import (
    causal_conv1d,
    gated_delta_rule,
    linear_attention,
    mamba2_ssm,
)
from lme_kernels.ops.linear_attention.settings import (
    chunk_candidates,
    chunk_settings,
    using_chunks,
)


@dataclass(frozen=True)
class Shape:
    B: int
    S: int
    H: int
    D: int

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(self.B, self.S, *shape, device="cuda", dtype=dtype)

    def heads(self) -> Tensor:
        return self.normal(self.H, self.D)

    def decay(self, *channels: int) -> Tensor:
        """Logarithms of decays as a gate gives them: mostly between 0.9 and 1."""
        return -self.normal(self.H, *channels, dtype=torch.float32).abs() * 0.05


@dataclass(frozen=True)
class Case:
    """One op at one shape: arguments, ours, and others with the same arguments."""

    name: str
    inputs: list[Tensor]
    ours: Callable[..., Tensor]
    peers: dict[str, Callable[[], Callable[..., Tensor]]]
    """Each imports a peer and returns a function of the inputs."""
    outputs: int
    """Elements of the outputs, in bf16."""

    @property
    def bytes_forward(self) -> int:
        return 2 * self.outputs + sum(each.nbytes for each in self.inputs)

    @property
    def bytes_both(self) -> int:
        return self.bytes_forward + 2 * self.outputs + 2 * sum(each.nbytes for each in self.inputs)


def simple_gla() -> Callable[..., Tensor]:
    from fla.ops.simple_gla import chunk_simple_gla

    return lambda q, k, v, g: chunk_simple_gla(q, k, v, g)[0]


def gla() -> Callable[..., Tensor]:
    from fla.ops.gla import chunk_gla

    return lambda q, k, v, g: chunk_gla(q, k, v, g)[0]


def plain() -> Callable[..., Tensor]:
    from fla.ops.linear_attn import chunk_linear_attn

    return lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False)[0]


def delta_rule() -> Callable[..., Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return lambda q, k, v, g, beta: chunk_gated_delta_rule(
        q, k, v, g, beta, use_qk_l2norm_in_kernel=True
    )[0]


def shared_simple_gla() -> Callable[..., Tensor]:
    from fla.ops.simple_gla import chunk_simple_gla

    def call(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        query, key = (each.expand(-1, -1, x.shape[2], -1) for each in (C, B))
        value, step = x * dt[..., None].to(x.dtype), dt * A
        y = chunk_simple_gla(query, key, value, step, scale=1.0)[0]
        return y + D[:, None].to(x.dtype) * x

    return call


def mamba_ssm() -> Callable[..., Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return lambda x, dt, A, B, C, D: mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D)


def convolution() -> Callable[..., Tensor]:
    from fla.modules.convolution import causal_conv1d as theirs

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = theirs(x, weight, bias, activation="silu", backend="triton")
        return y[0] if isinstance(y, tuple) else y

    return call


def with_decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return linear_attention(q, k, v, log_decay=g, backend="triton")


def three(shape: Shape) -> list[Tensor]:
    return [shape.heads() for _ in range(3)]


def head(shape: Shape) -> Case:
    inputs = [*three(shape), shape.decay()]
    peers = {"fla": simple_gla}
    return Case("linear_attention, decay a head", inputs, with_decay, peers, inputs[2].numel())


def channel(shape: Shape) -> Case:
    inputs = [*three(shape), shape.decay(shape.D)]
    return Case(
        "linear_attention, decay a channel", inputs, with_decay, {"fla": gla}, inputs[2].numel()
    )


def none(shape: Shape) -> Case:
    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, backend="triton")

    inputs = three(shape)
    return Case("linear_attention, no decay", inputs, ours, {"fla": plain}, inputs[2].numel())


def mamba(shape: Shape) -> Case:
    """Heads of 64, as many as fill the width, that share one group of 128."""

    def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return mamba2_ssm(x, dt, A, B, C, D=D, backend="triton")

    shape = Shape(shape.B, shape.S, shape.H * shape.D // 64, 64)
    inputs = [
        shape.heads(),
        shape.decay().abs(),
        -torch.rand(shape.H, device="cuda") - 0.5,
        shape.normal(1, 128),
        shape.normal(1, 128),
        torch.randn(shape.H, device="cuda"),
    ]
    peers = {"fla": shared_simple_gla, "mamba_ssm": mamba_ssm}
    return Case("mamba2_ssm", inputs, ours, peers, inputs[0].numel())


def delta(shape: Shape) -> Case:
    def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return gated_delta_rule(q, k, v, g, beta, backend="triton")

    inputs = [*three(shape), shape.decay(), shape.normal(shape.H).sigmoid()]
    return Case("gated_delta_rule", inputs, ours, {"fla": delta_rule}, inputs[2].numel())


def conv(shape: Shape) -> Case:
    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(x, weight, bias, activation="silu", backend="triton")

    C = shape.H * shape.D
    weight = torch.randn(C, 4, device="cuda", dtype=torch.bfloat16)
    inputs = [shape.normal(C), weight, torch.randn_like(weight[:, 0])]
    return Case("causal_conv1d, silu", inputs, ours, {"fla": convolution}, inputs[0].numel())


CASES: dict[str, Callable[[Shape], Case]] = {
    each.__name__: each for each in (head, channel, none, mamba, delta, conv)
}


class Timer:
    """Times calls on the device between which the cache is filled with something else."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.other = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def __call__(self, run: Callable[[], object]) -> tuple[float, float]:
        """Seconds of the first call, and milliseconds of the median one after it."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        first = time.perf_counter() - begin
        for _ in range(3):
            run()
        times = []
        for _ in range(self.repeats):
            self.other.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return first, statistics.median(times)


def both_ways(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    leaves = [each.detach().requires_grad_() for each in inputs]
    with torch.no_grad():
        grad = torch.randn_like(function(*inputs))

    def run() -> object:
        return torch.autograd.grad(function(*leaves), leaves, grad, allow_unused=True)

    return run


def measure(
    function: Callable[..., Tensor], inputs: list[Tensor], timer: Timer
) -> list[tuple[float, float]]:
    """First and median times of the forward alone, and of forward and backward."""
    with torch.no_grad():
        forward = timer(lambda: function(*inputs))
    return [forward, timer(both_ways(function, inputs))]


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def report(case: Case, timer: Timer) -> None:
    """Print the rows of a case."""
    own = measure(case.ours, case.inputs, timer)
    theirs: dict[str, list[tuple[float, float]]] = {}
    notes = []
    for name, load in case.peers.items():
        try:
            function = load()
            theirs[name] = measure(function, case.inputs, timer)
            with torch.no_grad():
                apart = difference(case.ours(*case.inputs), function(*case.inputs))
            notes.append(f"{name} differs by {apart:.1e}")
        except Exception as error:
            notes.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[:1]}")
    for index, (direction, moved) in enumerate(
        (("fwd", case.bytes_forward), ("fwd+bwd", case.bytes_both))
    ):
        first, ms = own[index]
        cells = [case.name, direction, f"{ms:.3f}", f"{moved / ms / 1e6:.0f}", f"{first:.1f}"]
        for name, times in theirs.items():
            peer_first, peer_ms = times[index]
            cells.append(f"{name} {peer_ms:.3f} ({peer_first:.1f} s), {peer_ms / ms:.2f}x ours")
        print("| " + " | ".join(cells) + " |", flush=True)
    for note in notes:
        print(f"<!-- {case.name}: {note} -->", flush=True)


def tune(kernels: list[str], shape: Shape, timer: Timer) -> None:
    """Print the fastest settings of our kernels with a decay a head, best first."""
    inputs = [*(shape.heads() for _ in range(3)), shape.decay()]
    rows = shape.B * shape.H

    for kernel in kernels:
        found = []
        default = chunk_settings(kernel, torch.bfloat16, shape.D, shape.D, rows, shape.S)
        candidates = chunk_candidates(kernel, torch.bfloat16, shape.D, shape.D)
        for settings in [default, *(each for each in candidates if each != default)]:
            try:
                with using_chunks(kernel, settings):
                    if kernel in ("walk", "outputs"):
                        with torch.no_grad():
                            _, ms = timer(lambda: with_decay(*inputs))
                    else:
                        _, ms = timer(both_ways(with_decay, inputs))
            except Exception as error:
                print(f"{kernel} {settings}: {type(error).__name__}", flush=True)
                continue
            found.append((ms, settings))
        print(f"{kernel} at {shape}: default {found[0][0]:.3f} ms", flush=True)
        for ms, settings in sorted(found, key=lambda each: each[0])[:5]:
            print(f"  {ms:.3f} ms {settings}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller shape, fewer repeats")
    parser.add_argument("--only", nargs="*", default=None, choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--width", type=int, default=128, help="channels of a head")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tune", nargs="*", default=[], help="kernels: walk, states, ...")
    given = parser.parse_args()
    torch.manual_seed(0)
    shape = Shape(given.batch, 4096, given.heads, given.width)
    if given.quick:
        shape = Shape(2, 2048, given.heads, given.width)
    timer = Timer(5 if given.quick else given.repeats)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {shape}, bf16")
    if given.tune:
        tune(given.tune, shape, timer)
        return
    print("| op | | ours ms | GB/s | first call s | others ms (first call), times ours |")
    print("| --- " * 6 + "|")
    for name, make in CASES.items():
        if given.only is not None and name not in given.only:
            continue
        try:
            report(make(shape), timer)
        except Exception as error:
            print(f"| {name} | | {type(error).__name__}: {str(error)[:300]!r} | | | |", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

"""Tokens per second, MFU and peak memory of one training step of the README model.

`python benchmarks/train_step.py --dtype bf16 --compile` prints one Markdown row a variant. Tokens
are random; data loading is measured by loader.py.
"""

import argparse
import statistics
import time

import torch

from lme_core.architectures.decoder import parameter_traits
from lme_core.config import from_dict
from lme_core.flops import count_parameters, device_peak_flops, flops_per_token
from lme_core.training.objectives import NextToken
from lme_core.training.optimizer_args import TorchAdamWArgs
from lme_core.training.optimizers import build_optimizer, step_optimizer
from lme_core.training.precision import MasterWeights
from lme_kernels.policy import KernelArgs, KernelPolicy
from lme_parallel.args import DistributedArgs
from lme_parallel.parallelize import parallelize
from lme_parallel.topology import Topology

README_MODEL = {
    "model_type": "gpt_base",
    "vocab_size": 50257,
    "hidden_size": 768,
    "num_layers": 12,
    "position_embedding_type": "rope",
    "normalization_function": "rmsnorm",
    "sequence_mixer_blocks": [
        {
            "sequence_mixer_type": "softmax_attention",
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
        }
    ],
    "mlp_blocks": [{"mlp_type": "MLP", "activation_function": "swiglu", "intermediate_size": 3072}],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(options):
    device = torch.device(options.device)
    config = from_dict(README_MODEL)
    kernels = KernelPolicy.from_args(KernelArgs(kernels=options.kernels))
    with torch.device("meta"):
        model = config.build(kernels)
    args = DistributedArgs(stage=0, torch_compile=options.compile)
    runtime = parallelize(
        model,
        Topology.from_args(args, world_size=1, rank=0),
        args,
        device=device,
        dtype=DTYPES[options.dtype],
        initial_value=model.initial_value,
        masters=MasterWeights,
    )
    optimizer = build_optimizer(
        TorchAdamWArgs(), runtime.named_parameters(), parameter_traits(model)
    )
    return config, runtime, optimizer


def batches(options, vocab_size):
    shape = (options.micro_batch, options.sequence + 1)
    for _ in range(options.warmup + options.steps):
        ids = torch.randint(vocab_size, shape, device=options.device)
        yield {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def run(options):
    config, runtime, optimizer = build(options)
    objective = NextToken({})
    cuda = options.device == "cuda"
    seconds = []
    for batch in batches(options, config.vocab_size):
        start = time.perf_counter()
        sums = runtime.forward_backward(objective, [batch])
        step_optimizer(optimizer, runtime.clip_gradients(1.0))
        runtime.finish_step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    measured = seconds[options.warmup :]
    tokens = options.micro_batch * options.sequence
    median = statistics.median(measured)
    rate = tokens / median
    flops = flops_per_token(config, options.sequence) * rate
    name = torch.cuda.get_device_name() if cuda else "cpu"
    peak = device_peak_flops(name, DTYPES[options.dtype])
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    spread = (max(measured) - min(measured)) / median
    mfu = "n/a" if peak is None else f"{100 * flops / peak:.1f} %"
    print(
        f"| {options.dtype} compile={options.compile} kernels={options.kernels} | {rate:,.0f} "
        f"| {1e3 * median:.2f} | {100 * spread:.0f} % | {flops / 1e12:.0f} | {mfu} "
        f"| {memory:.2f} | {seconds[0]:.1f} | {sums.loss.item():.3f} |"
    )
    if options.trace:
        trace(options, config, runtime, optimizer, objective)


def trace(options, config, runtime, optimizer, objective):
    """Where the time of a step goes, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _, batch in zip(range(3), batches(options, config.vocab_size), strict=False):
            runtime.forward_backward(objective, [batch])
            step_optimizer(optimizer, runtime.clip_gradients(1.0))
            runtime.finish_step()
        torch.cuda.synchronize()
    order = "self_cuda_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=70))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--kernels", nargs="*", help="as `kernel_args.kernels`; absent: automatic")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trace", action="store_true", help="print the time of each kernel")
    options = parser.parse_args()
    parameters = count_parameters(from_dict(README_MODEL))
    print(f"parameters: {parameters.total:,}, of them embeddings {parameters.embedding:,}")
    print("| variant | tokens/s | ms a step | spread | TFLOP/s | MFU | GiB | first step s | loss |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    run(options)


if __name__ == "__main__":
    main()

"""Fifty bf16 steps of the 400M model of each mixer: tokens per second, peak memory, loss.

`python benchmarks/train_mixers.py` trains every model of configs/research/m2rnn/400m that has one
mixer, and that of softmax attention with each further mixer in its place, on a language whose next
token mostly follows from the one before; one Markdown row each. `--models` chooses.
"""

import argparse
import os
import statistics
import time
import traceback
from pathlib import Path

import torch
import yaml

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

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "research" / "m2rnn" / "400m"
MIXERS = ("softmax-attention", "mamba2", "gated-deltanet", "gru", "rnn", "m2rnn")
# Mixers without a run file of their own, in the place of softmax attention.
FURTHER = {
    "linear-attention": {
        "sequence_mixer_type": "linear_attention",
        "k_head_dim": 128,
        "v_head_dim": 128,
        "num_q_heads": 8,
        "num_k_heads": 8,
        "num_v_heads": 8,
        "num_g_heads": 8,
    },
    "causal-convolution": {
        "sequence_mixer_type": "causal_convolution",
        "in_channels": 2048,
        "out_channels": 2048,
        "kernel_size": 4,
        "num_groups": 2048,
    },
    "latent-attention": {
        "sequence_mixer_type": "multihead_latent_attention",
        "num_attention_heads": 16,
        "head_dim": 64,
        "rope_head_dim": 32,
        "query_compression_size": 768,
        "key_value_compression_size": 512,
        "normalization_function": "rmsnorm",
    },
    "lstm": {
        "sequence_mixer_type": "lstm",
        "state_head_dim": 64,
        "num_input_heads": 16,
        "num_weight_heads": 16,
    },
}
WORDS = 2000


def language(options, device):
    """Batches of a random bigram language: nine tokens in ten follow from the one before."""
    generator = torch.Generator().manual_seed(0)
    follows = torch.randperm(WORDS, generator=generator).to(device)
    random = torch.Generator(device).manual_seed(0)
    B, S = options.micro_batch, options.sequence
    while True:
        token = torch.randint(WORDS, (B,), device=device, generator=random)
        noise = torch.rand((B, S), device=device, generator=random) < 0.1
        other = torch.randint(WORDS, (B, S), device=device, generator=random)
        tokens = [token]
        for t in range(S):
            token = torch.where(noise[:, t], other[:, t], follows[token])
            tokens.append(token)
        ids = torch.stack(tokens, 1)
        yield {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def model_config(name):
    """Return the configuration of a 400M model."""
    path = FOLDER / f"{'softmax-attention' if name in FURTHER else name}.yml"
    values = yaml.safe_load(path.read_text())["model_args"]["pretrained_config"]
    if name in FURTHER:
        values["sequence_mixer_blocks"] = [FURTHER[name]]
    return from_dict(values)


def train(name, options, prepared):
    """Train one model on batches; return its Markdown row."""
    device = torch.device(options.device)
    config = model_config(name)
    kernels = KernelPolicy.from_args(KernelArgs(kernels=options.kernels))
    with torch.device("meta"):
        model = config.build(kernels)
    args = DistributedArgs(stage=0, torch_compile=options.compile)
    runtime = parallelize(
        model,
        Topology.from_args(args, world_size=1, rank=0),
        args,
        device=device,
        dtype=torch.bfloat16,
        initial_value=model.initial_value,
        masters=MasterWeights,
    )
    optimizer = build_optimizer(
        TorchAdamWArgs(), runtime.named_parameters(), parameter_traits(model)
    )
    objective = NextToken({})
    seconds, losses = [], []
    for batch in prepared:
        start = time.perf_counter()
        sums = runtime.forward_backward(objective, [batch])
        step_optimizer(optimizer, runtime.clip_gradients(1.0))
        runtime.finish_step()
        losses.append(sums.loss.item())
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[5:])
    tokens = options.micro_batch * options.sequence
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = device_peak_flops(hardware, torch.bfloat16)
    flops = flops_per_token(config, options.sequence) * tokens / median
    mfu = "" if peak is None else f"{100 * flops / peak:.1f} %"
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    total = count_parameters(config).total
    return (
        f"| {name} | {total / 1e6:.0f} M | {tokens / median:,.0f} | {1e3 * median:.1f} | {mfu} "
        f"| {memory:.2f} | {seconds[0]:.1f} | {losses[0]:.2f} | {statistics.mean(losses[-5:]):.2f} |"
    )


def main():
    """Train the models one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=[*MIXERS, *FURTHER])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernels", nargs="*", help="as `kernel_args.kernels`; absent: automatic")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    print(
        "| model | parameters | tokens/s | ms a step | MFU | GiB | first step s | loss, first "
        "| loss, last 5 |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name in options.models:
        # Before this process has touched a GPU: a kernel that faults takes one model with it only.
        child = os.fork()
        if child == 0:
            os._exit(report(name, options))
        if os.waitpid(child, 0)[1] != 0:
            print(f"| {name} | failed, see above | | | | | | | |", flush=True)


def report(name: str, options: argparse.Namespace) -> int:
    """Train a model and print its row.

    Returns:
        Status of its process.
    """
    try:
        batches = language(options, torch.device("cpu"))
        prepared = [
            {name: each.to(options.device) for name, each in next(batches).items()}
            for _ in range(options.steps)
        ]
        print(train(name, options, prepared), flush=True)
    except RuntimeError:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()

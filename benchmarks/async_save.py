"""What an asynchronous save costs a training run: the stall, and steps between stall and COMMIT.

    python benchmarks/async_save.py [--folder DIR] [--micro-batch 2] [--saves 2]

Trains a 1B model with AdamW in bf16 on one device, on random tokens, and saves as
`async_checkpointing` does. Steps are timed one by one, each until the device is done. `lost` is
what the steps between stall and COMMIT took beyond as many undisturbed ones.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lme_core.architectures.decoder import parameter_traits
from lme_core.config import from_dict
from lme_core.flops import count_parameters
from lme_core.training.objectives import NextToken
from lme_core.training.optimizer_args import TorchAdamWArgs
from lme_core.training.optimizers import build_optimizer, step_optimizer
from lme_core.training.precision import MasterWeights
from lme_kernels.policy import KernelPolicy
from lme_parallel.args import DistributedArgs
from lme_parallel.checkpoint.args import SaveArgs
from lme_parallel.checkpoint.checkpointer import Checkpointer
from lme_parallel.parallelize import parallelize
from lme_parallel.topology import Topology

MODEL = {
    "model_type": "gpt_base",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_layers": 16,
    "max_position_embeddings": 4096,
    "position_embedding_type": "rope",
    "normalization_function": "rmsnorm",
    "sequence_mixer_blocks": [
        {
            "sequence_mixer_type": "softmax_attention",
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        }
    ],
    "mlp_blocks": [{"mlp_type": "MLP", "intermediate_size": 8192, "activation_function": "swiglu"}],
}
TINY = {
    "model_type": "gpt_base",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_layers": 2,
    "max_position_embeddings": 4096,
    "sequence_mixer_blocks": [
        {"sequence_mixer_type": "softmax_attention", "num_attention_heads": 4}
    ],
    "mlp_blocks": [{"mlp_type": "MLP", "intermediate_size": 128}],
}
WARMUP, UNDISTURBED = 5, 20


@dataclass
class State:
    step: int = 0
    tokens: int = 0


def build(options: argparse.Namespace, folder: Path) -> tuple[Callable[[], None], Checkpointer]:
    """Return a function that trains one step, and what saves."""
    device = torch.device(options.device)
    config = from_dict(TINY if options.tiny else MODEL)
    args = DistributedArgs(stage=0)
    topology = Topology.from_args(args, 1, 0)
    with torch.device("meta"):
        model = config.build(KernelPolicy())
    runtime = parallelize(
        model,
        topology,
        args,
        device=device,
        dtype=torch.bfloat16,
        initial_value=model.initial_value,
        masters=MasterWeights,
    )
    optimizer = build_optimizer(
        TorchAdamWArgs(), runtime.named_parameters(), parameter_traits(model)
    )
    checkpointer = Checkpointer(
        SaveArgs(save_path=str(folder), save_interval=1, async_checkpointing=True, keep_last=1),
        parameters=runtime.named_parameters(),
        buffers=runtime.named_buffers(),
        optimizer=optimizer,
        stateful={},
        documents={},
        topology=topology,
    )
    vocabulary = config.vocab_size
    shape = (options.micro_batch, options.sequence)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, shape, generator=generator).to(device)
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    objective = NextToken({})

    def step() -> None:
        runtime.forward_backward(objective, [batch])
        step_optimizer(optimizer, runtime.clip_gradients(1.0))
        runtime.finish_step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    print(
        f"parameters {count_parameters(config).total / 1e6:.0f} M, host buffer"
        f" {checkpointer.buffer_bytes / 2**30:.2f} GiB"
    )
    return step, checkpointer


def timed(run: Callable[[], None]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Train, save, and print one row a save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where checkpoints go; absent: a new one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--saves", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a small model, to try this script")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        step, checkpointer = build(options, folder)
        for _ in range(WARMUP):
            step()
        print("| save | ms a step | stall s | stall to COMMIT s | steps meanwhile | lost |")
        print("| --- | --- | --- | --- | --- | --- |")
        for number in range(1, options.saves + 1):
            usual = statistics.median(timed(step) for _ in range(UNDISTURBED))
            state = State(step=number)
            stall = timed(lambda state=state: checkpointer.save(state))
            commit = folder / f"global_step{number}" / "COMMIT"
            start, meanwhile = time.perf_counter(), []
            while not commit.exists():
                meanwhile.append(timed(step))
            until = time.perf_counter() - start
            checkpointer.wait()
            lost = sum(meanwhile) / (usual * max(len(meanwhile), 1)) - 1
            print(
                f"| {number} | {1e3 * usual:.1f} | {stall:.2f} | {until:.1f} | {len(meanwhile)}"
                f" | {100 * lost:.1f} % |",
                flush=True,
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

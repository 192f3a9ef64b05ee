"""Every shipped run file's model, made small with its structure kept, trains."""

import math
from pathlib import Path

import pytest
import torch

from lme_cli.loading import check_run
from lme_cli.run_file import load
from lme_core.architectures.decoder import parameter_traits
from lme_core.config import from_dict, to_dict
from lme_core.training.batches import BatchStream
from lme_core.training.experts import ExpertBalance
from lme_core.training.objectives import NextToken
from lme_core.training.optimizers import build_optimizer
from lme_core.training.runtime import SingleDevice
from lme_core.training.schedules import LRSchedulerArgs, build_schedule
from lme_core.training.trainer import Trainer, TrainState
from lme_kernels.policy import KernelPolicy

ROOT = Path(__file__).resolve().parents[2] / "configs"
FILES = [path for path in sorted(ROOT.rglob("*.yml")) if path.name != "unshard.yml"]
V, H, S = 64, 32, 16
SMALL = {
    "intermediate_size": 24,
    "shared_intermediate_size": 8,
    "head_dim": 8,
    "state_head_dim": 4,
    "k_head_dim": 6,
    "v_head_dim": 4,
    "state_size": 5,
    "chunk_size": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def small_block(block):
    """A block of the same kind with few channels; heads of one number stay of one number."""
    small = {}
    for name, value in block.items():
        if name.endswith("_heads") and type(value) is int:
            small[name] = 1 if value == 1 else 4
        else:
            small[name] = SMALL[name] if name in SMALL and value is not None else value
    return small


def small_model(config):
    """The same architecture: one layer of each run of equal layers, at most six."""
    settings = to_dict(config)
    mixers = [small_block(block) for block in settings["sequence_mixer_blocks"] or []]
    if len(mixers) > 1:
        mixers = [b for i, b in enumerate(mixers) if i == 0 or b != mixers[i - 1]][:6]
    layers = len(mixers) if len(mixers) > 1 else 4
    settings |= {
        "vocab_size": V,
        "hidden_size": H,
        "num_layers": layers,
        "max_position_embeddings": S,
        "sequence_mixer_blocks": mixers or None,
        "mlp_blocks": [small_block(block) for block in settings["mlp_blocks"]][:1],
    }
    if settings.get("sharing_pattern"):
        settings["sharing_pattern"] = settings["sharing_pattern"][:layers]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings[name] = None
    return from_dict(settings)


class Tokens:
    """The same rows for ever."""

    def __next__(self):
        tokens = torch.randint(V, (2, S + 1), generator=torch.Generator().manual_seed(0))
        index = torch.arange(2 * S).view(2, S)
        ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return {"input_ids": ids, "labels": labels, "token_index": index}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_model_of_a_run_file_trains(file):
    run = check_run(load(file)).run
    config = small_model(run.model_args.pretrained_config)
    kinds = {block.sequence_mixer_type for block in run.model_args.pretrained_config.mixers()}
    assert {block.sequence_mixer_type for block in config.mixers()} == kinds
    with torch.device("meta"):
        model = config.build(KernelPolicy())
    runtime = SingleDevice(model)
    optimizer = build_optimizer(
        run.optimizer_args, runtime.named_parameters(), parameter_traits(model), config.m_width
    )
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    schedule = build_schedule(LRSchedulerArgs(num_warmup_steps=0), optimizer, 3)
    reports = []
    Trainer(
        runtime,
        NextToken(config.auxiliary_weights()),
        optimizer,
        schedule,
        BatchStream(Tokens(), gradient_accumulation_steps=1, device="cpu"),
        [lambda state, report: reports.append(report)],
        num_training_steps=3,
        balance=ExpertBalance.of(config, runtime.named_buffers()),
    ).fit(TrainState())
    losses = [report.values["lm_loss"].item() for report in reports]
    # Two updates on the same rows, from a guess among all tokens.
    assert losses[0] == pytest.approx(math.log(V), abs=0.3)
    assert losses[2] < losses[1] < losses[0]
    assert all(report.grad_norm.isfinite() for report in reports)


def test_every_block_list_is_one_entry_or_one_for_each_layer():
    lengths = {}
    for file in FILES:
        config = check_run(load(file)).run.model_args.pretrained_config
        lengths[file.name] = len(config.sequence_mixer_blocks)
        assert len(config.sequence_mixer_blocks) in (1, config.num_layers), file
        if "hybrid" not in file.name:
            assert len(config.sequence_mixer_blocks) == 1, file
        assert len(config.mlp_blocks) == 1, file
    assert lengths

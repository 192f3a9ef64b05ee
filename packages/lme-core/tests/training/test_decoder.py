"""The loop trains a real decoder."""

import pytest
import torch

from lme_core.architectures.decoder import parameter_traits
from lme_core.config import from_dict
from lme_core.training.batches import BatchStream
from lme_core.training.objectives import NextToken
from lme_core.training.optimizer_class_args import AdamWClassArgs
from lme_core.training.optimizers import TorchAdamWArgs, build_optimizer
from lme_core.training.runtime import SingleDevice
from lme_core.training.schedules import LRSchedulerArgs, build_schedule
from lme_core.training.trainer import Trainer, TrainState
from lme_kernels.policy import KernelPolicy


class OneBatch:
    """The same batch for ever: what can be learned by heart."""

    def __next__(self):
        tokens = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(1))
        index = torch.arange(4 * 32).view(4, 32)
        labels = tokens[:, 1:].contiguous()
        return {"input_ids": tokens[:, :-1].contiguous(), "labels": labels, "token_index": index}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decoder_learns_a_batch_by_heart(dtype):
    config = from_dict(
        {
            "model_type": "gpt_base",
            "vocab_size": 64,
            "hidden_size": 48,
            "num_layers": 2,
            "position_embedding_type": "rope",
            "sequence_mixer_blocks": [
                {
                    "sequence_mixer_type": "softmax_attention",
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "dropout": 0.01,
                }
            ],
            "mlp_blocks": [
                {"mlp_type": "MLP", "activation_function": "swiglu", "intermediate_size": 96}
            ],
        }
    )
    with torch.device("meta"):
        model = config.build(KernelPolicy())
    runtime = SingleDevice(model, dtype=dtype)
    args = TorchAdamWArgs(class_args=AdamWClassArgs(lr=1e-2))
    optimizer = build_optimizer(args, runtime.named_parameters(), parameter_traits(model))
    schedule = build_schedule(LRSchedulerArgs(num_warmup_steps=5), optimizer, 40)
    stream = BatchStream(OneBatch(), gradient_accumulation_steps=1, device="cpu")
    losses = []
    trainer = Trainer(
        runtime,
        NextToken(),
        optimizer,
        schedule,
        stream,
        [lambda state, report: losses.append(report.loss.item())],
        num_training_steps=40,
    )
    trainer.fit(TrainState())
    # At first every token is equally likely: ln 64 = 4.16.
    assert losses[0] == pytest.approx(4.16, abs=0.1)
    assert losses[-1] < 0.3

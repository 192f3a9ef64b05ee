"""Run files of both vintages of the earlier system parse, and mean what they meant there."""

import pytest

from lme_cli.loading import check_run
from lme_cli.run_file import parse

# Everything that the later vintage requires, a block for each layer.
LATER = """
datasets:
  - class_name: MegatronDataset
    data_name: Megatron
    data_sampling_ratio: 1
    class_args:
      eval_steps: 2
      data_cache_path: cache
      data_path: [1, tokens_text]
      split: 98,1,1
      sequence_length: 2048
      num_workers: 2
      seed: 123
      fim_rate: 0.5
      fim_spm_rate: 0.5
      node_uses_local_storage: false
tokenizer_args:
  tokenizer_name: gpt2
kernel_args:
  kernels: [flash_attention_2, rmsnorm_memory_efficient, swiglu_packed, fused_linear_cross_entropy]
model_args:
  efficient_initialization: true
  use_padding_free_transformer: false
  pretrained_config:
    model_type: gpt_base
    vocab_size: 50257
    max_position_embeddings: 2048
    hidden_size: 768
    num_layers: 3
    normalization_function: layernorm
    layer_norm_epsilon: 1e-5
    initializer_range: 0.02
    bos_token_id: 50256
    eos_token_id: 50256
    pad_token_id: 50256
    position_embedding_type: learned_absolute
    rope_theta: 10000
    rope_scaling: null
    m_emb: null
    m_width: null
    m_residual: null
    init_method: normal
    embedding_init_method: normal
    use_depth_scaled_init: true
    tie_word_embeddings: false
    router_aux_loss_coef: 0.01
    sequence_mixer_blocks:
      - &mixer
        sequence_mixer_type: softmax_attention
        num_attention_heads: 12
        num_key_value_heads: 1
        attention_multiplier: 0.015625
        add_bias: false
      - *mixer
      - *mixer
    mlp_blocks:
      - &mlp {mlp_type: MLP, activation_function: gelu_pytorch_tanh, intermediate_size: 3072,
              add_bias: false}
      - *mlp
      - *mlp
tuning_args: {tuning_method: pretraining}
save_args: {save_path: checkpoints, save_interval: 25, async_checkpointing: false}
load_args: {load_path: checkpoints}
logging_args:
  log_interval: 10
  experiments_tracker_name: aim
  aim_args: {repo: aim-repo, experiment: test}
training_parameters:
  num_training_steps: 100
  eval_interval: 20
  micro_batch_size: 6
  global_batch_size: 12
  eval_during_training: true
optimizer_args:
  class_name: TorchAdamW
  class_args: {lr: 1e-5, weight_decay: 0.1, betas: [0.9, 0.95], eps: 1e-10}
lr_scheduler_args: {lr_decay_style: cosine, num_warmup_steps: 5, num_decay_steps: 95}
mixed_precision_args: {dtype: bfloat16}
distributed_args:
  fsdp_algorithm: 2
  zero_topology: {data_parallel_replication_world_size: 1, data_parallel_sharding_world_size: 1}
  gradient_checkpointing_method: block
  gradient_checkpointing_args: {num_blocks: 1}
  torch_compile: true
  stage: 0
random_args: {seed: 42}
"""

# What the older vintage gave defaults to, written down nowhere.
OLDER = """
datasets:
  - {class_name: DebugDataset, data_name: d, class_args: {num_examples: 10, sequence_length: 8}}
model_args:
  pretrained_config:
    model_type: gpt_base
    use_cache: true
    sequence_mixer_blocks: [{sequence_mixer_type: softmax_attention, qkv_bias: true}]
    mlp_blocks: [{mlp_type: MLP, activation_function: swiglu, use_interleaved_weights: false}]
tuning_args: {tuning_method: pretraining}
save_args: {save_path: x, save_interval: 10}
training_parameters: {num_training_steps: 500, micro_batch_size: 4, eval_interval: 10}
logging_args: {experiments_tracker_name: wandb, wandb_args: {project: p, name: n}}
"""


def test_a_file_of_the_later_vintage_means_what_it_meant():
    loaded = check_run(parse(LATER, name="later.yml"))
    run, config = loaded.run, loaded.run.model_args.pretrained_config
    assert config is not None
    assert len(config.mixers()) == 3
    assert config.mixers()[2].scale(768) == 0.015625
    assert config.mixers()[0].num_key_value_heads == 1
    assert config.mlps()[1].intermediate_size == 3072
    assert config.position_embedding_type == "learned_absolute"
    assert run.optimizer_args.class_args.eps == 1e-10
    assert str(run.mixed_precision_args.torch_dtype) == "torch.bfloat16"
    assert run.load_args is not None
    assert run.load_args.load_optimizer
    assert [str(each) for each in loaded.warnings] == [
        "`model_args.efficient_initialization` has no effect: models are always built without "
        "memory and initialised shard by shard"
    ]


def test_a_file_of_the_older_vintage_gets_its_defaults():
    loaded = check_run(parse(OLDER, name="older.yml"))
    config = loaded.run.model_args.pretrained_config
    assert config is not None
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (50304, 768, 12)
    assert config.mixers()[0].num_attention_heads == 12
    assert config.mixers()[0].qkv_bias
    assert loaded.run.training_parameters.gradient_clipping == 1
    assert loaded.run.lr_scheduler_args.num_warmup_steps == 200
    told = "\n".join(str(each) for each in loaded.warnings)
    assert "use_cache" in told
    assert "use_interleaved_weights" in told


@pytest.mark.parametrize(
    ("training", "sizes"),
    [
        # Any two of three; alone, a micro batch is a step.
        ("micro_batch_size: 4", (4, 1, 4)),
        ("micro_batch_size: 4, gradient_accumulation_steps: 3", (4, 3, 12)),
        ("micro_batch_size: 4, global_batch_size: 8", (4, 2, 8)),
        ("gradient_accumulation_steps: 2, global_batch_size: 8", (4, 2, 8)),
    ],
)
def test_the_batch_is_found_from_what_is_given(training, sizes):
    from lme_core.training.batch_plan import BatchPlan

    text = OLDER.replace("micro_batch_size: 4", training)
    run = check_run(parse(text, name="older.yml")).run
    plan = BatchPlan.resolve(run.training_parameters, 1)
    found = (plan.micro_batch_size, plan.gradient_accumulation_steps, plan.global_batch_size)
    assert found == sizes


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("algorithm", ["1", "2", "3", "null"])
def test_every_stage_and_algorithm_is_accepted(stage, algorithm):
    text = OLDER + f"distributed_args: {{stage: {stage}, fsdp_algorithm: {algorithm}}}\n"
    assert check_run(parse(text, name="older.yml")).run.distributed_args.stage == stage

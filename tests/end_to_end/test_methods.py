"""The whole path on a tiny model: pretrain, unshard, finetune, distill, export, generate."""

import contextlib
import io
import json
import sys

import pytest
import torch

from lme_cli import app
from lme_convert.directory import ModelDirectory

MODEL = """
model_args:
  pretrained_config:
    model_type: gpt_base
    vocab_size: 300
    hidden_size: {hidden_size}
    num_layers: 2
    max_position_embeddings: 64
    position_embedding_type: rope
    sequence_mixer_blocks: [{{num_attention_heads: 2, num_key_value_heads: 1}}]
    mlp_blocks: [{{activation_function: swiglu, intermediate_size: 48}}]
"""
COMMON = """
tokenizer_args: {{tokenizer_name: {folder}/tokenizer}}
training_parameters: {{num_training_steps: {steps}, micro_batch_size: 4, eval_interval: 10}}
lr_scheduler_args: {{num_warmup_steps: 2}}
optimizer_args: {{class_args: {{lr: 1e-2}}}}
logging_args: {{log_interval: 1}}
save_args: {{save_path: {folder}/{name}, save_interval: 100}}
"""
TOKENS = """
datasets:
  - class_name: MegatronDataset
    data_name: corpus
    class_args: {{data_path: [{folder}/corpus], split: "80,20,0", sequence_length: 32, eval_steps: 1}}
"""
EXAMPLES = """
datasets:
  - class_name: HuggingFaceDataset
    data_name: sums
    class_args: {{data_path: {folder}/examples, input_key: question, output_key: answer}}
    input_format: "Q: __input__ A: "
    output_format: "__output__"
    max_input_tokens: 24
    max_output_tokens: 8
"""


def lme(*arguments):
    """Run the command in this process; its output."""
    previous, sys.argv = sys.argv, ["lme", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            app.main()
    except SystemExit as error:
        code = error.code or 0
    finally:
        sys.argv = previous
    assert code == 0, out.getvalue() + err.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tokenizer, token files, examples and a pretrained model directory."""
    from lme_data.tokenizer import train_byte_level_bpe

    folder = tmp_path_factory.mktemp("path")
    lines = [f"the sum of {a} and {b} is {a + b}" for a in range(20) for b in range(20)]
    (folder / "text").mkdir()
    for number in range(0, 400, 4):
        (folder / "text" / f"{number}.txt").write_text("\n".join(lines[number : number + 4]))
    files = sorted((folder / "text").iterdir())
    train_byte_level_bpe(files, vocab_size=300).save(folder / "tokenizer")
    lme("data", "tokenize", folder / "text", "--tokenizer", folder / "tokenizer",
        "--output-prefix", folder / "corpus")  # fmt: skip
    (folder / "examples").mkdir()
    for split, numbers in (("train", range(1, 18)), ("validation", range(18, 20))):
        rows = [
            json.dumps({"question": f"{a} and {b}", "answer": str(a + b)})
            for a in numbers
            for b in range(20)
        ]
        (folder / "examples" / f"{split}.jsonl").write_text("\n".join(rows))
    run(folder, "pretrained", MODEL.replace("{hidden_size}", "32") + TOKENS, "pretraining")
    lme("unshard", folder / "pretrained", folder / "model")
    return folder


def run(folder, name, sections, method, steps=20):
    """Train; the rows of its metrics."""
    file = folder / f"{name}.yml"
    text = sections + COMMON + f"tuning_args: {{{{tuning_method: {method}}}}}\n"
    file.write_text(text.format(folder=folder, name=name, steps=steps))
    lme("train", file)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(rows, key="lm_loss"):
    return [row[key] for row in rows if row["context"] == "train"]


def test_finetuning_starts_from_the_model_and_learns_the_answers(folder):
    rows = run(folder, "finetuned", "model_args: {{model_name: {folder}/model}}\n" + EXAMPLES,
               "full_finetuning")  # fmt: skip
    found = losses(rows)
    assert sum(found[-3:]) / 3 < found[0] - 0.5
    assert [row["step"] for row in rows if row["context"] == "val"] == [10, 20]


def test_the_first_step_of_finetuning_has_the_models_own_weights(folder):
    from lme_parallel.checkpoint.unshard import iterate_tensors

    sections = "model_args: {{model_name: {folder}/model}}\n" + TOKENS
    # The first update has learning rate 0, so what is saved after it is what was loaded.
    run(folder, "started", sections, "pretraining", steps=1)
    model = ModelDirectory(folder / "model")
    for name, tensor in iterate_tensors(folder / "started"):
        assert torch.equal(tensor, model.tensor(name)), name


def test_distillation_brings_the_student_nearer_to_its_teacher(folder):
    teacher = (
        "teacher_args: {{model_name: {folder}/model, kl_divergence_method: backward, "
        "kl_divergence_weight: 2.0}}\n"
    )
    rows = run(
        folder, "student", MODEL.replace("{hidden_size}", "16") + TOKENS + teacher, "distillation"
    )
    divergence = losses(rows, "kl_divergence")
    assert divergence[-1] < divergence[0] / 2
    first = next(row for row in rows if row["context"] == "train")
    assert first["loss"] == pytest.approx(first["lm_loss"] + 2 * first["kl_divergence"], rel=1e-5)


def test_an_imported_model_is_trained_on(folder):
    lme("convert", "export", folder / "model", folder / "hf")
    sections = "model_args: {{model_name: {folder}/hf}}\n" + TOKENS
    rows = run(folder, "continued", sections, "pretraining", steps=2)
    pretrained = json.loads((folder / "pretrained" / "metrics.jsonl").read_text().splitlines()[0])
    # Where a new model starts, a trained one is past.
    assert losses(rows)[0] < pretrained["loss"] - 1


def test_generation_continues_what_was_learned(folder):
    text = lme("generate", folder / "pretrained", "--prompt", "the sum of", "--temperature", "0",
               "--max-new-tokens", "8")  # fmt: skip
    assert text.startswith("the sum of")
    assert len(text) > len("the sum of") + 3

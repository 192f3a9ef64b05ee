import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lme_convert import certificate
from lme_convert.api import certify, export_to_hf, import_from_hf, open_model
from lme_convert.certificate import make_prompts
from lme_convert.errors import CertificateError

# Multi-head, so that query, key, value and output have one shape; biases, so that they do too.
SQUARE = {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}


def same_shaped_pairs(tensors):
    return [
        (one, other)
        for one, other in itertools.combinations(sorted(tensors), 2)
        if tensors[one].shape == tensors[other].shape
    ]


@pytest.fixture(scope="module")
def models(save_hf, tmp_path_factory):
    """A model of theirs, and ours made of it."""
    path = tmp_path_factory.mktemp("models")
    source = save_hf(path / "theirs", **SQUARE)
    import_from_hf(source, path / "ours")
    return path


def mutated(directory, tensors, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(directory, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture
def caught(models, monkeypatch):
    """Whether a certificate refuses a model of ours; their side is the same, and run once."""
    batches = certificate.make_prompts(101, 64)
    expected = certificate._run_theirs(models / "theirs", batches, None)
    monkeypatch.setattr(certificate, "_run_theirs", lambda *_: expected)

    def refuses(build):
        try:
            certify(models / "theirs", models / "ours", build)
        except CertificateError as error:
            return "do not agree" in str(error)
        return False

    return refuses


def test_the_unharmed_model_passes(caught, build_model):
    assert not caught(build_model)


def test_every_swap_of_two_tensors_of_theirs_is_caught(models, caught, build_model, tmp_path):
    """Whatever two roles a mapping confuses: gate and up, query and key, two layers, two norms."""
    tensors = load_file(models / "theirs" / "model.safetensors")
    pairs = same_shaped_pairs(tensors)
    assert len(pairs) > 100
    for one, other in pairs:
        swapped = tensors | {one: tensors[other], other: tensors[one]}
        wrong = open_model(mutated(models / "theirs", swapped, tmp_path / "wrong"))
        assert caught(lambda config, _, wrong=wrong: build_model(config, wrong)), (one, other)


def test_every_swap_of_two_tensors_of_ours_is_caught(models, caught, build_model):
    tensors = load_file(models / "ours" / "model.safetensors")
    pairs = same_shaped_pairs(tensors)
    assert len(pairs) > 20
    for one, other in pairs:
        wrong = tensors | {one: tensors[other], other: tensors[one]}
        assert caught(lambda config, _, wrong=wrong: build_model(config, wrong)), (one, other)


def rows_exchanged(tensor):
    return tensor.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def halves(tensor):
    return torch.cat((tensor[0::2], tensor[1::2]))


def ungrouped(tensor):
    return tensor.unflatten(0, (4, 3, 8)).transpose(0, 1).flatten(0, 2)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        # Gate and up in each other's rows; one after the other instead of interleaved.
        ("blocks.1.mlp.gate_up.weight", rows_exchanged),
        ("blocks.1.mlp.gate_up.weight", halves),
        # Queries, keys, values one after the other instead of grouped; heads in reverse.
        ("blocks.1.sequence_mixer.qkv.weight", ungrouped),
        ("blocks.1.sequence_mixer.qkv.weight", lambda x: x.unflatten(0, (4, -1)).flip(0)),
        ("blocks.1.sequence_mixer.qkv.bias", ungrouped),
        ("blocks.1.sequence_mixer.output.weight", lambda x: x.T),
        ("blocks.1.mlp_norm.weight", lambda x: x + 1),
    ],
)
def test_a_wrong_row_order_is_caught_in_its_block(name, change, models, build_model, tmp_path):
    tensors = load_file(models / "ours" / "model.safetensors")
    tensors[name] = change(tensors[name]).reshape(tensors[name].shape).contiguous()
    wrong = mutated(models / "ours", tensors, tmp_path / "wrong")
    with pytest.raises(CertificateError, match="first differing layer: block 1"):
        certify(models / "theirs", wrong, build_model)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("embedding.weight", "embedding"),
        ("blocks.0.mlp.down.bias", "block 0"),
        ("blocks.1.mlp.down.bias", "block 1"),
        ("final_norm.weight", "head"),
        ("lm_head.weight", "head"),
    ],
)
def test_the_first_differing_layer_is_named(name, layer, models, build_model, tmp_path):
    tensors = load_file(models / "ours" / "model.safetensors")
    tensors[name] = tensors[name] * 1.01
    wrong = mutated(models / "ours", tensors, tmp_path / "wrong")
    with pytest.raises(CertificateError, match=f"first differing layer: {layer}"):
        certify(models / "theirs", wrong, build_model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_caught(value, models, build_model, tmp_path):
    tensors = load_file(models / "ours" / "model.safetensors")
    tensors["blocks.1.mlp.down.weight"][0, 0] = value
    wrong = mutated(models / "ours", tensors, tmp_path / "wrong")
    with pytest.raises(CertificateError, match="do not agree"):
        certify(models / "theirs", wrong, build_model)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 9000.0},
        {"layer_norm_epsilon": 1e-3},
        {"rope_scaling": {"rope_type": "linear", "factor": 1.01}},
        {"m_residual": 0.999},
    ],
    ids=str,
)
def test_a_wrong_setting_is_caught(changes, models, build_model, tmp_path):
    wrong = shutil.copytree(models / "ours", tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CertificateError, match="do not agree"):
        certify(models / "theirs", wrong, build_model)


def test_nothing_is_left_behind_when_the_certificate_is_refused(models, build_model, tmp_path):
    def wrong(config, tensors):
        return build_model(config | {"m_emb": 1.001}, tensors)

    with pytest.raises(CertificateError, match="first differing layer: embedding"):
        import_from_hf(models / "theirs", tmp_path / "ours", build_model=wrong)
    with pytest.raises(CertificateError, match="first differing layer: embedding"):
        export_to_hf(models / "ours", tmp_path / "back", build_model=wrong)
    assert list(tmp_path.iterdir()) == []
    # The bar is the caller's to set.
    import_from_hf(models / "theirs", tmp_path / "ours", build_model=wrong, tolerance=0.1)


def test_the_result_is_written_into_the_output(models, build_model, tmp_path):
    import_from_hf(models / "theirs", tmp_path / "ours", build_model=build_model)
    record = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    result = record["certificate"]
    assert result["status"] == "certified"
    assert 0 < result["max_logit_difference"] <= 1e-5 < result["max_logit"]
    assert result["tolerance"] == 1e-5
    assert result["first_differing_layer"] is None
    assert result["prompts"] == [[1, 64], [2, 33]]
    assert record["source"] == str(models / "theirs")
    assert {"torch", "transformers", "lme-convert"} <= record["versions"].keys()
    assert any("GroupedQKV" in rule for rule in record["rules"])


def test_without_a_builder_the_certificate_says_so(models):
    record = json.loads((models / "ours" / "conversion.json").read_text())
    assert record["certificate"]["status"] == "not certified"
    assert record["certificate"]["max_logit_difference"] is None
    assert certify(models / "theirs", models / "ours").status == "not certified"


def test_a_rounding_export_compares_the_translation_not_the_rounding(models, build_model, tmp_path):
    target = tmp_path / "back"
    result = export_to_hf(models / "ours", target, build_model=build_model, dtype=torch.bfloat16)
    assert result.max_logit_difference <= 1e-5
    tensors = load_file(target / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"
    # Compared without the rounding, the two do differ.
    with pytest.raises(CertificateError, match="do not agree"):
        certify(models / "ours", target, build_model)


def test_a_model_that_transformers_would_complete_at_random_is_refused(
    models, build_model, tmp_path
):
    tensors = load_file(models / "theirs" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    broken = mutated(models / "theirs", tensors, tmp_path / "broken")
    with pytest.raises(CertificateError, match=r"missing keys model.layers.1.mlp.up_proj"):
        certify(broken, models / "ours", build_model)


def test_two_directories_of_one_side_are_refused(models, build_model):
    with pytest.raises(CertificateError, match="both are llama and llama"):
        certify(models / "theirs", models / "theirs", build_model)
    with pytest.raises(CertificateError, match="both are gpt_base and gpt_base"):
        certify(models / "ours", models / "ours", build_model)
    with pytest.raises(ValueError, match="`tolerance` must be above 0"):
        certify(models / "theirs", models / "ours", build_model, tolerance=0.0)


def test_prompts_are_the_same_everywhere_and_cover_the_vocabulary():
    long, short = make_prompts(50_000, 4096)
    assert long.shape == (1, 256)
    assert short.shape == (2, 33)
    assert long[0, :4].tolist() == [96, 21309, 15306, 36519]
    assert len(long.unique()) > 200
    assert long.max() > 45_000
    assert min(each.min() for each in (long, short)) >= 0
    assert [each.shape[1] for each in make_prompts(5, 3)] == [3, 3]

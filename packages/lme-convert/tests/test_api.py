import json
import os
import re
import subprocess
import sys

import pytest
import torch

import lme_convert
from lme_convert import hub
from lme_convert.api import (
    convert_hf_to_lm_engine,
    convert_lm_engine_to_hf,
    export_to_hf,
    import_from_hf,
    open_model,
)
from lme_convert.directory import ModelDirectory
from lme_convert.errors import ConversionError, HubError, ModelDirectoryError, UnsupportedModelError
from lme_convert.families import FAMILIES


def test_a_model_of_theirs_opens_as_one_of_ours(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs", attention_bias=True)
    import_from_hf(source, tmp_path / "ours")
    theirs, ours = open_model(source), open_model(str(tmp_path / "ours"))
    assert theirs.config == ours.config
    assert theirs.tokenizer_path == source
    assert set(theirs) == set(ours) == set(ours.names)
    assert len(theirs) == len(ours)
    for name in ours:
        assert torch.equal(theirs[name], ours[name])
        rows = len(ours[name])
        region = (slice(rows // 3, rows - 1), slice(1, 9))[: ours[name].dim()]
        assert torch.equal(theirs.tensor(name, region), ours[name][region])
        assert torch.equal(ours.tensor(name, region), ours[name][region])
    for model in (theirs, ours):
        assert "odd" not in model
        with pytest.raises(KeyError):
            model["odd"]
        with pytest.raises(ValueError, match="leaves its shape"):
            model.tensor("blocks.0.mlp.gate_up.weight", (slice(0, 97),))


def test_the_names_of_the_older_tools_work(save_hf, tmp_path):
    source, ours, back = (str(tmp_path / name) for name in ("theirs", "ours", "back"))
    save_hf(source)
    convert_hf_to_lm_engine(model_name=source, output_path=ours)
    convert_lm_engine_to_hf(checkpoint_path=ours, output_path=back, model_type="llama")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "llama"


def test_export_goes_back_to_where_a_model_came_from(save_hf, tmp_path):
    """A Mistral without window is a Llama too; its own record decides."""
    import_from_hf(save_hf(tmp_path / "theirs", "mistral", sliding_window=None), tmp_path / "ours")
    export_to_hf(tmp_path / "ours", tmp_path / "back")
    assert ModelDirectory(tmp_path / "back").model_type == "mistral"
    (tmp_path / "ours" / "conversion.json").unlink()
    export_to_hf(tmp_path / "ours", tmp_path / "first")
    assert ModelDirectory(tmp_path / "first").model_type == "llama"


def test_a_model_that_no_family_expresses_names_each_reason(save_hf, tmp_path):
    import_from_hf(save_hf(tmp_path / "theirs"), tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["normalization_function"] = "p_norm"
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError) as caught:
        export_to_hf(tmp_path / "ours", tmp_path / "back")
    message = str(caught.value)
    assert "llama: `normalization_function` is 'p_norm'" in message
    # Families of another kind have another reason.
    for family in FAMILIES:
        assert re.search(rf"^  {family}: `\w+` is ", message, re.MULTILINE), family


def test_mistaken_directions_are_explained(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs")
    import_from_hf(source, tmp_path / "ours")
    with pytest.raises(ConversionError, match="already is a model directory of ours"):
        import_from_hf(tmp_path / "ours", tmp_path / "out")
    with pytest.raises(ConversionError, match="`model_type` llama, which is not one of ours"):
        export_to_hf(source, tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' .* known families are llama"):
        export_to_hf(tmp_path / "ours", tmp_path / "out", "gpt2")
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "global_step3" / "COMMIT").write_text("{}")
    (tmp_path / "global_step3" / "config.json").write_text(
        '{"model_type": "gpt_base", "format_version": 1}'
    )
    with pytest.raises(ModelDirectoryError, match=r"`lme unshard .*global_step3 OUT` first"):
        export_to_hf(tmp_path / "global_step3", tmp_path / "out")


@pytest.mark.parametrize("path", ["./nothing", "/nothing/here", "a/b/c", "~/nothing-at-all"])
def test_what_can_only_be_a_path_is_not_asked_of_the_hub(path, monkeypatch):
    monkeypatch.setattr(hub, "download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ModelDirectoryError, match="is not a directory"):
        open_model(path)


def test_a_name_is_fetched_without_anything_that_can_run_code(save_hf, tmp_path, monkeypatch):
    import huggingface_hub

    source, asked = save_hf(tmp_path / "theirs"), {}

    def snapshot_download(name, *, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = open_model("someone/something", revision="v1")
    assert model.config["model_type"] == "gpt_base"
    assert (asked["name"], asked["revision"]) == ("someone/something", "v1")
    assert not any(each.endswith((".bin", ".pt", ".py", "*")) for each in asked["patterns"])


@pytest.mark.parametrize("name", ["someone/something", "not a name", "gpt2"])
def test_offline_the_error_says_what_to_do(name, monkeypatch, tmp_path):
    from huggingface_hub import constants

    # The cache is empty, and no connection is tried.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match=f"`{name}` is (not in the local cache|neither)"):
        open_model(name)


def test_reading_needs_neither_transformers_nor_its_hub(save_hf, tmp_path):
    """Conversion without certificate works with torch and safetensors alone."""
    save_hf(tmp_path / "theirs")
    code = (
        "import sys\n"
        "for name in ('transformers', 'huggingface_hub', 'numpy'): sys.modules[name] = None\n"
        "from lme_convert.api import *\n"
        f"import_from_hf({str(tmp_path / 'theirs')!r}, {str(tmp_path / 'ours')!r})\n"
        f"export_to_hf({str(tmp_path / 'ours')!r}, {str(tmp_path / 'back')!r})\n"
        "from lme_convert.errors import HubError, CertificateError\n"
        "try: open_model('a/b')\n"
        "except HubError as error: assert 'lme-convert[hf]' in str(error)\n"
        "else: raise SystemExit(3)\n"
        f"try: certify({str(tmp_path / 'theirs')!r}, {str(tmp_path / 'ours')!r}, print)\n"
        "except CertificateError as error: assert 'lme-convert[hf]' in str(error)\n"
        "else: raise SystemExit(4)\n"
    )
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "back" / "model.safetensors").exists()


def test_the_version_is_the_package_s(save_hf, tmp_path):
    import_from_hf(save_hf(tmp_path / "theirs"), tmp_path / "ours")
    record = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert record["versions"]["lme-convert"] == lme_convert.__version__

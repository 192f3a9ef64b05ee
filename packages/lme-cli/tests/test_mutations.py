"""Every setting of a full run file, spoilt in every way: each is caught, at its line, by name."""

from collections import Counter

import pytest

from lme_cli.loading import check_fragment, check_run
from lme_cli.overrides import apply_overrides
from lme_cli.problems import RunFileError, dotted
from lme_cli.run_file import load, parse


@pytest.fixture(scope="module")
def full(request):
    return load(request.path.parent / "data" / "full.yml", name="full.yml")


@pytest.fixture(scope="module")
def lines(request):
    return (request.path.parent / "data" / "full.yml").read_text().splitlines()


def keys(full):
    """Paths of all keys written in the file, items of lists left out."""
    return [path for path in full.places if path and isinstance(path[-1], str)]


def problems(text):
    with pytest.raises(RunFileError) as caught:
        check_run(parse(text, name="full.yml"))
    return caught.value.problems


def with_line(lines, number, text):
    return "\n".join([*lines[: number - 1], text, *lines[number:]])


def misspellings(key, turn):
    """Two of: a doubled letter, a lost one, two swapped, a hyphen; others at each turn."""
    found = list(_all_misspellings(key))
    return {found[turn % len(found)], found[(turn + 1) % len(found)]}


def _all_misspellings(key):
    middle = len(key) // 2
    yield key[:middle] + key[middle] + key[middle:]
    if len(key) > 2:
        yield key[:middle] + key[middle + 1 :]
        swapped = key[: middle - 1] + key[middle] + key[middle - 1] + key[middle + 1 :]
        if swapped != key:
            yield swapped
    if "_" in key:
        yield key.replace("_", "-", 1)


def test_the_full_file_itself_is_fine(full):
    loaded = check_run(full)
    assert loaded.run.optimizer_args.class_args.lr == 3e-4


def test_every_misspelt_key_is_caught_and_the_right_one_is_suggested(full, lines):
    verdicts = Counter()
    for turn, path in enumerate(keys(full)):
        place = full.places[path]
        line = lines[place.line - 1]
        for wrong in misspellings(path[-1], turn):
            if (*path[:-1], wrong) in full.places:
                continue
            before, after = line[: place.column - 1], line[place.column - 1 :]
            text = with_line(lines, place.line, before + after.replace(path[-1], wrong, 1))
            found = [each for each in problems(text) if each.path == (*path[:-1], wrong)]
            # A misspelt `class_name` also leaves the class open.
            if not found and path[-1] == "class_name":
                continue
            assert found, f"`{dotted(path)}` as `{wrong}` was not caught"
            assert found[0].place.line == place.line, wrong
            verdicts["right" if found[0].suggestion == path[-1] else "wrong"] += 1
    judged = verdicts["right"] + verdicts["wrong"]
    assert judged > 200
    assert verdicts["right"] / judged >= 0.95, verdicts


def test_every_duplicated_key_is_caught(full, lines):
    for path in keys(full):
        place = full.places[path]
        line = lines[place.line - 1]
        indent = " " * (place.column - 1)
        if "{" in line:
            continue
        copy = f"{indent}{path[-1]}: 1"
        # Behind the key's own line where that is complete, else in front of it.
        is_first = line.strip().startswith("- ")
        value = line[place.column - 1 :].partition(":")[2].strip()
        if value:
            text = "\n".join([*lines[: place.line], copy, *lines[place.line :]])
            at = place.line + 1
        elif not is_first:
            text = "\n".join([*lines[: place.line - 1], copy, *lines[place.line - 1 :]])
            at = place.line + 1
        else:
            continue
        (found, *_) = problems(text)
        assert found.path == path
        assert found.place.line == at
        assert "given twice" in found.message


def test_every_value_of_a_wrong_type_is_caught(full):
    for path in keys(full):
        for wrong in ("{surely: {not: this}}", "[[[1]]]"):
            changed = apply_overrides(full, [f"{dotted(path)}={wrong}"])
            with pytest.raises(RunFileError) as caught:
                check_run(changed)
            about = [each for each in caught.value.problems if each.path[: len(path)] == path]
            about += [
                each
                for each in caught.value.problems
                if path[: len(each.path)] == each.path and path[-1] in str(each)
            ]
            assert about, f"`{dotted(path)}={wrong}`: {caught.value}"


OUT_OF_RANGE = {
    "random_args.seed": "1e30",
    "model_args.pretrained_config.vocab_size": "0",
    "model_args.pretrained_config.num_layers": "-1",
    "model_args.pretrained_config.embedding_dropout": "1.5",
    "model_args.pretrained_config.m_width": "0",
    "model_args.pretrained_config.eos_token_id": "512",
    "model_args.pretrained_config.init_method": "mpu",
    "model_args.pretrained_config.sequence_mixer_blocks.0.num_attention_heads": "3",
    "model_args.pretrained_config.sequence_mixer_blocks.0.sliding_window": "0",
    "model_args.pretrained_config.mlp_blocks.0.activation_function": "swiglo",
    "model_args.pretrained_config.mlp_blocks.0.intermediate_size": "0",
    "tuning_args.tuning_method": "pretrainin",
    "optimizer_args.class_name": "TorchAdamV",
    "optimizer_args.class_args.lr": "-1",
    "optimizer_args.class_args.betas": "[0.9, 1.5]",
    "lr_scheduler_args.num_warmup_steps": "-1",
    "lr_scheduler_args.lr_decay_style": "cosinus",
    "datasets.0.class_name": "MegatronDatset",
    "datasets.0.data_sampling_ratio": "-1",
    "datasets.0.class_args.sequence_length": "0",
    "datasets.0.class_args.fim_rate": "1.5",
    "datasets.0.class_args.order": "random",
    "save_args.save_interval": "0",
    "save_args.save_path": "''",
    "load_args.iteration": "-1",
    "load_args.load_optimizer": "false",
    "training_parameters.num_training_steps": "0",
    "training_parameters.micro_batch_size": "0",
    "training_parameters.gradient_clipping": "-1",
    "logging_args.log_interval": "0",
    "logging_args.logging_level": "LOUD",
    "mixed_precision_args.dtype": "fp12",
    "distributed_args.stage": "4",
    "distributed_args.sequence_parallel": "true",
    "distributed_args.num_pipeline_stages": "0",
    "kernel_args.kernels": "[rmsnrom]",
    "teacher_args.kl_divergence_weight": "-1",
    "teacher_args.kl_divergence_method": "sideways",
}


@pytest.mark.parametrize(("path", "value"), OUT_OF_RANGE.items(), ids=str)
def test_values_out_of_range_are_caught_by_name(full, path, value):
    with pytest.raises(RunFileError) as caught:
        check_run(apply_overrides(full, [f"{path}={value}"]))
    assert path.rpartition(".")[2] in str(caught.value)
    assert all(each.place is not None for each in caught.value.problems)


@pytest.mark.parametrize(
    "path",
    [
        "model_args",
        "tuning_args.tuning_method",
        "datasets",
        "datasets.0.data_name",
        "datasets.0.class_args.sequence_length",
        "save_args.save_path",
        "training_parameters.num_training_steps",
        "teacher_args.kl_divergence_method",
    ],
)
def test_a_required_setting_that_is_missing_is_named(full, path):
    values = apply_overrides(full, []).values
    here = values
    parts = [int(part) if part.isdecimal() else part for part in path.split(".")]
    for part in parts[:-1]:
        here = here[part]
    del here[parts[-1]]
    with pytest.raises(RunFileError, match="required and missing") as caught:
        check_run(type(full)("full.yml", values, full.places))
    assert f"`{path}`" in str(caught.value)


def test_each_section_alone_is_a_fragment(full):
    for name, value in full.values.items():
        places = {path: place for path, place in full.places.items() if path[:1] in ((), (name,))}
        check_fragment(type(full)("full.yml", {name: value}, places))


def test_a_misspelt_section_of_a_fragment_gets_a_suggestion():
    with pytest.raises(RunFileError, match="did you mean `kernel_args`"):
        check_fragment(parse("kernel_arg: {}\n", name="full.yml"))

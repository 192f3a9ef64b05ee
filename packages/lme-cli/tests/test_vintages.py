"""Settings of older run files are moved or dropped with a warning that says where."""

from lme_cli.run_file import parse
from lme_cli.vintages import modernise


def test_a_renamed_setting_is_moved_with_all_below_it():
    read = parse("distributed_args:\n  tensor_parallel_size: 2\n  stage: 0\n", name="run.yml")
    modern, (warning,) = modernise(read)
    assert modern.values == {"distributed_args": {"stage": 0, "tensor_parallel_world_size": 2}}
    assert modern.places[("distributed_args", "tensor_parallel_world_size")].line == 2
    assert str(warning) == (
        "run.yml:2:3: `distributed_args.tensor_parallel_size` was renamed; "
        "write `distributed_args.tensor_parallel_world_size`"
    )
    assert read.values["distributed_args"]["tensor_parallel_size"] == 2


def test_an_obsolete_setting_is_dropped_in_every_block():
    text = (
        "model_args: {pretrained_config: {mlp_blocks: "
        "[{use_interleaved_weights: true}, {use_interleaved_weights: false, dropout: 0}]}}"
    )
    modern, warnings = modernise(parse(text, name="run.yml"))
    assert modern.values["model_args"]["pretrained_config"]["mlp_blocks"] == [{}, {"dropout": 0}]
    assert len(warnings) == 2
    assert "has no effect" in str(warnings[0])


def test_a_setting_given_under_both_names_stays_to_be_refused():
    text = "distributed_args: {tensor_parallel_size: 2, tensor_parallel_world_size: 4}"
    modern, warnings = modernise(parse(text, name="run.yml"))
    assert modern.values["distributed_args"]["tensor_parallel_size"] == 2
    assert warnings == []

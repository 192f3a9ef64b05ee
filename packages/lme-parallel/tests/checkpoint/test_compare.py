from lme_parallel.checkpoint.compare import differences

SAVED = {
    "model_args": {"pretrained_config": {"hidden_size": 64, "blocks": [{"type": "a"}]}},
    "random_args": {"seed": 42},
    "training_parameters": {"num_training_steps": 10},
    "tied": True,
}


def test_equal_runs_have_no_differences():
    assert differences(SAVED, SAVED) == []
    assert differences({"a": [1, 2]}, {"a": (1, 2)}) == []


def test_each_difference_is_named_by_its_path():
    current = {
        "model_args": {"pretrained_config": {"hidden_size": 128, "blocks": [{"type": "b"}]}},
        "random_args": {},
        "training_parameters": {"num_training_steps": 20},
        "tied": 1,
        "new": None,
    }
    assert differences(SAVED, current, ignore=["training_parameters"]) == [
        "model_args.pretrained_config.blocks[0].type: saved 'a', now 'b'",
        "model_args.pretrained_config.hidden_size: saved 64, now 128",
        "new: saved '(absent)', now None",
        "random_args.seed: saved 42, now '(absent)'",
        "tied: saved True, now 1",
    ]


def test_lists_of_other_lengths_are_shown_whole():
    assert differences({"a": [1]}, {"a": [1, 2]}) == ["a: saved [1], now [1, 2]"]

"""Lists of corpora: with weights, without, and wrong ones."""

import pytest

from lme_data.paths import parse_blend


@pytest.mark.parametrize(
    ("value", "prefixes", "weights"),
    [
        ("a", ("a",), None),
        (["a"], ("a",), None),
        (["a", "b", "c"], ("a", "b", "c"), None),
        (["a", "b"], ("a", "b"), None),
        ([1, "a", 3, "b"], ("a", "b"), (0.25, 0.75)),
        (["0.2", "a"], ("a",), (1.0,)),
        # An even list in which one weight is a name is a list of prefixes.
        (["0.2", "a", "b", "c"], ("0.2", "a", "b", "c"), None),
    ],
)
def test_weighted_and_plain_lists(value, prefixes, weights):
    blend = parse_blend(value)
    assert blend.prefixes == prefixes
    assert blend.weights == weights


@pytest.mark.parametrize(
    "value", [[], [0.5, "a", "b"], [0, "a", 1, "b"], [-1, "a", 1, "b"], [float("nan"), "a"], [1, 2]]
)
def test_wrong_lists_are_refused_by_name(value):
    with pytest.raises(ValueError, match="`train_data_path`"):
        parse_blend(value, "train_data_path")

"""`--set section.key=value`."""

import pytest

from lme_cli.overrides import SET, apply_overrides
from lme_cli.problems import RunFileError
from lme_cli.run_file import parse

TEXT = "a:\n  b: 1\n  c: [{d: 1}, {d: 2}]\n"


def applied(*settings):
    return apply_overrides(parse(TEXT, name="run.yml"), settings)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("a.b=2", {"a": {"b": 2, "c": [{"d": 1}, {"d": 2}]}}),
        ("a.b=3e-4", {"a": {"b": 3e-4, "c": [{"d": 1}, {"d": 2}]}}),
        ("a.b=null", {"a": {"b": None, "c": [{"d": 1}, {"d": 2}]}}),
        ("a.b=", {"a": {"b": None, "c": [{"d": 1}, {"d": 2}]}}),
        ("a.b=x=y", {"a": {"b": "x=y", "c": [{"d": 1}, {"d": 2}]}}),
        ("a.c.1.d=5", {"a": {"b": 1, "c": [{"d": 1}, {"d": 5}]}}),
        ("a.c.2.d=5", {"a": {"b": 1, "c": [{"d": 1}, {"d": 2}, {"d": 5}]}}),
        ("a.c=[1, 2]", {"a": {"b": 1, "c": [1, 2]}}),
        ("e.f.g=1", {"a": {"b": 1, "c": [{"d": 1}, {"d": 2}]}, "e": {"f": {"g": 1}}}),
        ("e.0.g=1", {"a": {"b": 1, "c": [{"d": 1}, {"d": 2}]}, "e": [{"g": 1}]}),
    ],
)
def test_one_value_is_replaced(setting, values):
    assert applied(setting).values == values


def test_later_settings_win_and_places_say_where_from():
    read = applied("a.b=2", "a.b=3", "a.c={x: 1}")
    assert read.values["a"] == {"b": 3, "c": {"x": 1}}
    assert read.places[("a", "b")] == SET
    assert read.places[("a", "c", "x")] == SET
    assert ("a", "c", 0, "d") not in read.places
    assert read.text.endswith("# --set a.b=2\n# --set a.b=3\n# --set a.c={x: 1}\n")


def test_the_file_that_was_read_is_left_alone():
    read = parse(TEXT, name="run.yml")
    apply_overrides(read, ["a.b=2"])
    assert read.values["a"]["b"] == 1


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("a.b", ["section.key=value"]),
        ("=3", ["section.key=value"]),
        ("a.b.c=1", ["`a.b` is 1", "no parts"]),
        ("a.c.7.d=1", ["list of 2", "`7`", "0 to 2"]),
        ("a.c.x=1", ["list of 2", "`x`"]),
        ("a.b=[1", ["--set a.b", "not valid YAML"]),
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting, words):
    with pytest.raises(RunFileError) as caught:
        applied(setting)
    for word in words:
        assert word in str(caught.value)

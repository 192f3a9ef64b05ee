"""Reading run files: numbers, keys, places, limits."""

import math

import pytest

from lme_cli.problems import Place, RunFileError
from lme_cli.run_file import load, parse, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # What YAML 1.1 alone reads as a string.
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-2e+3", -2e3),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000_000", 1_000_000),
        ("0x10", 16),
        ("0o10", 8),
        # What YAML 1.1 reads as eight, as 750 and as a date.
        ("010", 10),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("98,1,1", "98,1,1"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("+7", 7),
        ("-7", -7),
        ("'3'", "3"),
        ("~", None),
        ("", None),
        ("null", None),
        ("yes", True),
        ("off", False),
        ("[1, 2e0, x]", [1, 2.0, "x"]),
    ],
)
def test_scalars_are_read_as_yaml_1_2_numbers(text, value):
    read = parse_value(text, name="test")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(("text", "value"), [(".inf", math.inf), ("-.INF", -math.inf)])
def test_infinities_are_read(text, value):
    assert parse_value(text, name="test") == value
    assert math.isnan(parse_value(".nan", name="test"))


def test_every_key_and_item_has_its_place():
    read = parse("a:\n  b: 1\n  c:\n  - x\n  -   y: 2\n", name="run.yml")
    assert read.places[("a", "b")] == Place("run.yml", 2, 3)
    assert read.places[("a", "c", 1, "y")] == Place("run.yml", 5, 7)
    # Of what was not written, the nearest thing around it.
    assert read.place(("a", "c", 1, "z")) == Place("run.yml", 5, 7)


def test_aliases_and_merge_keys_are_followed_and_the_nearer_key_wins():
    text = "base: &base {x: 1, y: {z: 2}}\nuse:\n  <<: *base\n  x: 3\nlist: [*base]\n"
    read = parse(text, name="run.yml")
    assert read.values["use"] == {"x": 3, "y": {"z": 2}}
    assert read.values["list"] == [{"x": 1, "y": {"z": 2}}]
    assert read.places[("use", "x")].line == 4
    assert read.places[("use", "y", "z")].line == 1


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, ["`a`", "given twice", "line 1"]),
        ("a:\n  b: 1\n  b: 2\n", 3, ["`a.b`", "given twice", "line 2"]),
        ("a: &x [*x]\n", 1, ["deeper"]),
        ("a: !!python/object/apply:os.system [ls]\n", 1, ["`a`", "tag"]),
        ("a: !custom 1\n", 1, ["`a`", "tag", "!custom"]),
        ("a:\n\tb: 1\n", 2, ["not valid YAML", "spaces, not tabs"]),
        ("a: b: c\n", 1, ["not valid YAML", "quote"]),
        ("- 1\n- 2\n", 1, ["mapping of sections", "list"]),
        ("{a: 1\n", 2, ["not valid YAML"]),
        ("? [1, 2]\n: 3\n", 1, ["key that is not a plain name"]),
        ("a: 1\n---\nb: 2\n", 2, ["not valid YAML"]),
        ("a: {<<: 3}\n", 1, ["`<<` takes a mapping"]),
    ],
)
def test_what_is_not_a_run_file_is_refused_with_its_line(text, line, words):
    with pytest.raises(RunFileError) as caught:
        parse(text, name="run.yml")
    (problem,) = caught.value.problems
    assert problem.place.line == line
    for word in words:
        assert word in str(problem)


def test_aliases_that_multiply_are_refused_soon():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for level in range(1, 12):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    with pytest.raises(RunFileError, match="200000 values"):
        parse("\n".join(lines), name="run.yml")


def test_deep_nesting_is_refused_and_not_a_crash():
    with pytest.raises(RunFileError, match="deeper than 64 levels"):
        parse("a: " + "[" * 5000 + "]" * 5000, name="run.yml")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(RunFileError, match=r"absent\.yml.*no such file"):
        load(tmp_path / "absent.yml")
    (tmp_path / "latin.yml").write_bytes(b"a: \xff\n")
    with pytest.raises(RunFileError, match="not UTF-8"):
        load(tmp_path / "latin.yml")


def test_an_empty_file_has_no_sections():
    assert parse("# nothing\n", name="run.yml").values == {}

"""The page about the run file says what the sections say."""

from pathlib import Path

from lme_cli.reference import render

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "run-file.md"


def test_the_page_is_up_to_date():
    command = "lme config schema --markdown > docs/reference/run-file.md"
    assert PAGE.read_text(encoding="utf-8") == render(), f"run `{command}`"

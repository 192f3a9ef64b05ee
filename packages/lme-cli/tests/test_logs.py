"""The log: ours on standard error, others' only where it matters, one rank's voice."""

import logging
import re
import warnings

import pytest

from lme_cli import logs


@pytest.fixture(autouse=True)
def _restored():
    root = logging.getLogger()
    handlers, level, form = list(root.handlers), root.level, warnings.formatwarning
    yield
    logging.captureWarnings(False)
    warnings.formatwarning = form
    root.handlers[:], root.level = handlers, level


def test_our_lines_and_others_warnings_are_shown(capsys):
    logs.configure("INFO")
    logging.getLogger("lme_core.x").info("checkpoint saved: step=%d", 3)
    logging.getLogger("lme_core.x").debug("hidden")
    logging.getLogger("other.library").info("chatter")
    logging.getLogger("other.library").warning("serious")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO lme_core\.x: checkpoint saved: step=3", first)
    assert second.endswith("WARNING other.library: serious")


def test_ranks_above_zero_only_warn_and_say_who_they_are(capsys):
    logs.configure("INFO", rank=3)
    logging.getLogger("lme_core.x").info("hidden")
    logging.getLogger("lme_core.x").warning("odd")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[rank 3] ")


def test_warnings_for_users_come_without_a_line_of_code(capsys):
    logs.configure("INFO")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("`a.b` has no effect", UserWarning, stacklevel=1)
    assert capsys.readouterr().err.splitlines()[0].endswith(": `a.b` has no effect")


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="`logging_level` must be one of"):
        logs.configure("LOUD")


def test_colours_stay_off_where_nobody_sees_them(capsys):
    logs.configure("INFO", colored=True)
    logging.getLogger("lme_core.x").warning("odd")
    assert "\x1b" not in capsys.readouterr().err

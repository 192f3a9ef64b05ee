"""What is shown during a run, at a terminal and elsewhere."""

import io
import re

import pytest

from lme_cli.display import Progress, duration, print_table


def train(step, loss=2.5):
    return {"context": "train", "group": None, "step": step, "loss": loss,
            "learning_rate": 1e-3, "tokens_per_second": 1234.5}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (245, "4:05"), (3723, "1:02:03"), (-1, "0:00")],
)
def test_times_are_written_as_people_read_them(seconds, text):
    assert duration(seconds) == text


def test_elsewhere_each_record_is_one_plain_line():
    stream = io.StringIO()
    progress = Progress(200, stream=stream)
    progress.start(100)
    progress.log(train(150))
    progress.log({"context": "val", "group": None, "step": 150, "loss": 3.0})
    progress.log({"context": "val", "group": "code", "step": 150, "loss": 2.0})
    progress.finish()
    first, *others = stream.getvalue().splitlines()
    assert re.fullmatch(
        r"step 150/200  loss 2\.5000  learning rate 1\.00e-03  1,234 tokens/s  \d:\d\d left", first
    )
    assert others == [
        "step 150/200  validation loss 3.0000",
        "step 150/200  validation code loss 2.0000",
    ]


def test_time_left_counts_from_where_the_run_was_resumed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lme_cli.display.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(200, stream=stream)
    progress.start(100)
    now[0] = 60.0
    progress.log(train(120))
    # 20 steps took a minute, so the 80 that are left take four.
    assert stream.getvalue().strip().endswith("4:00 left")


def test_at_a_terminal_there_is_a_bar_with_the_numbers(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "140")
    progress = Progress(200, stream=Terminal())
    progress.start(0)
    progress.log({"context": "val", "group": None, "step": 10, "loss": 3.25})
    progress.log(train(150))
    progress.finish()
    shown = capsys.readouterr().out
    assert "150/200" in shown
    assert "loss 2.5000 val 3.2500  lr 1.0e-03  1.234k tokens/s" in shown


def test_a_record_whose_loss_is_not_finite_is_shown():
    stream = io.StringIO()
    progress = Progress(10, stream=stream)
    progress.start(0)
    progress.log(train(1, loss=float("nan")))
    assert "loss nan" in stream.getvalue()


def test_tables_have_two_columns():
    stream = io.StringIO()
    print_table("Title:", [("a", "1"), ("longer", "2")], stream)
    assert stream.getvalue() == "Title:\n  a       1\n  longer  2\n"
